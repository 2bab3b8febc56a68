"""Drawing only: the figures of the benchmarks, one module each."""
