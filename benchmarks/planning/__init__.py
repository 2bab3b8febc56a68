"""Plans: how even, how fast, on how many ranks."""
