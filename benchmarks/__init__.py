"""Benchmarks, in the same rooms as distplb; run each file as a module from the root of the checkout."""
