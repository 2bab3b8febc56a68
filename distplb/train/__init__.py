"""What a training loop holds: `Rebalancer` and its parts. May import all rooms below but `study`."""
