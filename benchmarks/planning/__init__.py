"""Benchmarks of plans: balance, time, and scaling with ranks."""
