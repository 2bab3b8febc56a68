"""Moving experts between GPUs: `optimizer_state` says what travels with an expert, `layout` who holds it, `schedule`
which moves make a change, `transfer` carries it out, and `mover` is what the `Rebalancer` calls.

May import `comm` and `core`.
"""
