"""The raw calls of each framework that the caches are measured against."""
