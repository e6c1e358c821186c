"""kvcache under mlx-lm: see :mod:`kvcache.adapters`."""
