"""Benchmarks of splitting one step's tokens over replicas and GPUs."""
