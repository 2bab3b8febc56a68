"""Parts of bench_scaling: the job of a rank, the cells, the model, the report."""
