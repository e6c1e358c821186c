"""kvcache under flax: see :mod:`kvcache.adapters`."""
