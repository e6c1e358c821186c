"""kvcache under transformers: see :mod:`kvcache.adapters`."""
