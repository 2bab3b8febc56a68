"""Benchmarks of the package as a whole."""
