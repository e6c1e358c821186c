"""Recorded requests replayed against a prefix cache, with any eviction policy."""
