"""What several benchmarks use: loads, traces, planners to compare with, processes, tables."""
