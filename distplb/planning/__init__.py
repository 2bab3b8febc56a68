"""Load and topology in, placement out: pure, but for `plan`, which has the collectives between the stages.

May import `packing`, `comm` and `core`.
"""
