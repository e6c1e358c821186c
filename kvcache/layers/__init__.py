"""Per-layer caches: one stream of tokens, or a batch of equally long ones, per layer."""
