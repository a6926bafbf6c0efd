"""The comparisons of the papers: several methods on one task, and what each costs."""
