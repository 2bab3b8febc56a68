"""Communication between ranks: communicators, agreement, the job's store, and each rank's part of distributed tensors.

The only room that uses a communication library. May import `core`.
"""
