"""Stage 3: neighbours, votes, metrics, the zero-shot baseline, and comparisons of runs."""
