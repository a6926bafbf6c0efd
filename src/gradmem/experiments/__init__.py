"""Comparisons as in the papers: several methods on one task, what each costs, and sweeps over write steps."""
