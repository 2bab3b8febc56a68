"""Parts of bench_scaling: what a rank does, the model, the report."""
