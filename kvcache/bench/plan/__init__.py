"""The cost of planning a pass on the host."""
