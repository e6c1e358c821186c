"""The cost of appending one token."""
