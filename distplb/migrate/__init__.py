"""Moving experts: `state` finds what travels, `pieces` says who holds it, `schedule` decides, `transfer` acts,
and `mover` holds them together for the `Rebalancer`.

May import `comm` and `core`.
"""
