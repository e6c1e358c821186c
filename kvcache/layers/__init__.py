"""Per-layer caches: one sequence of tokens, or the rows of a batch, per layer."""
