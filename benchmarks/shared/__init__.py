"""Code that several benchmarks share: loads, traces, planners to compare with, processes, tables."""
