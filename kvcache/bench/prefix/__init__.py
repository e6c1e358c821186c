"""The cost of finding, inserting and evicting prefixes."""
