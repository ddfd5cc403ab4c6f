"""Merge mathematics: pure functions of tensors, one file a family, found by name in `registry`.

`apply.combine` is the one way in: it keeps the promises that hold for every method (float32, exact end points, finite
input), so that a method's file is its formula. Nothing here knows files, recipes or models.
"""
