"""State taken out of a cache, kept, and put back, also through files."""
