"""The cost of the cache in a decode step of all layers."""
