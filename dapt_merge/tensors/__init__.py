"""Tensors as they lie in memory: what their numbers are stored as, and where; torch only once it computes with them."""
