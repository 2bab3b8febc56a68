"""Turn a load and a topology into a placement. All of it is pure but `plan`, which runs collectives between stages.

May import `packing`, `comm` and `core`.
"""
