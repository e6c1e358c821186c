"""Adapters: caches of kvcache inside models that other libraries bring, with no line changed there.

A module here is named after the library that it adapts, and imports it; nothing else does.
"""
