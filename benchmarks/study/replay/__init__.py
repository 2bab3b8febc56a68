"""Parts of bench_replay: the replays, the report."""
