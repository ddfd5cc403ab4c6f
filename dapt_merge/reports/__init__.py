"""Leaves of the data flow: tables, plots and words made from measured numbers."""
