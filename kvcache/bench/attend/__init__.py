"""The cost of attention of a decode pass over a pool."""
