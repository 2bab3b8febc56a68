"""Load and topology in, placement out: pure, but for `plan`, which has the collectives between.

May import `packing`, `comm` and `core`.
"""
