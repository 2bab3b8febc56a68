"""Parts of bench_replay: the replays and the report."""
