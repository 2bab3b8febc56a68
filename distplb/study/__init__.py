"""Estimate what rebalancing would have saved on a recorded trace. May import `planning`, `records` and `core`."""
