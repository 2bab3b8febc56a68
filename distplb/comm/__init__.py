"""How ranks exchange: communicators, agreement, the job's store, and what torch keeps distributed of a tensor.

The only room that knows a communication library. May import `core`.
"""
