"""Multi-sequence caches: the tokens of many sequences in one pool of cells."""
