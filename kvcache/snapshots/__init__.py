"""State of a cache, taken out, kept, and put back, also through files."""
