"""Move experts between GPUs, with their gradients and optimizer state.

`optimizer_state` collects what travels with an expert, `layout` describes which rank holds it, `schedule` splits a
change of placement into moves, `transfer` carries them out, and `mover` is what the `Rebalancer` calls.

May import `comm` and `core`.
"""
