"""Carry out the split of a step: count, lend replicas, compute, bring gradients home.

May import `core`, `splitting` and `comm`.
"""
