"""Prefixes that requests have in common, computed once.

``cache``     sessions over any cache, which begin with what earlier ones have computed
``index``     which spans of tokens are kept, within a budget
``policies``  which of them goes first
``radix``     a radix tree over token ids
``trie``      per-layer caches by the tokens they hold
"""

from .cache import PrefixCache, PrefixStats, Session
from .events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from .metrics import register_metrics
from .policies import Policy
from .trie import Entry, PrefixTrie

__all__ = [
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "Entry",
    "Event",
    "Policy",
    "PrefixCache",
    "PrefixStats",
    "PrefixTrie",
    "Session",
    "register_metrics",
]
