"""The cost of holding recurrent states."""
