"""Prefixes that requests have in common, found again.

``radix``  a radix tree over token ids
``trie``   per-layer caches by the tokens they hold
"""

from .trie import Entry, PrefixTrie

__all__ = ["Entry", "PrefixTrie"]
