"""Layout, lengths and masks of the arrays of a cache, and the checks of updates."""
