"""The arrays that tokens lie in: layout, lengths, masks, and what may be written."""
