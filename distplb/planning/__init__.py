"""Turn a load and a topology into a placement. Only `plan`, which runs collectives between stages, is not pure.

May import `packing`, `comm` and `core`.
"""
