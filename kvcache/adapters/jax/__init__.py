"""kvcache in plain JAX programs: see :mod:`kvcache.adapters`."""
