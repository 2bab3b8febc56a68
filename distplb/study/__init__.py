"""What rebalancing would have been worth on a recorded trace. May import `planning`, `records` and `core`."""
