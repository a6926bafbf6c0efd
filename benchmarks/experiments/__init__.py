"""Experiments that are no comparison of methods: `python -m benchmarks.experiments.NAME`, from a checkout."""
