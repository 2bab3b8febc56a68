"""Rebalancing in a training loop."""
