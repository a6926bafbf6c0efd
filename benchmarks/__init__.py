"""Speed, measured: `python -m benchmarks.NAME`, from a checkout."""
