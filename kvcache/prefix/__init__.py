"""Prefix reuse: the common beginning of requests, computed once.

``cache``       the prefix cache, over any cache
``requests``    how requests begin and end
``session``     one request, from its prompt to its last token
``explain``     why tokens of its prompt were not reused
``reasons``     the answer, for people and programs
``asked``       arguments of a session
``waiting``     sessions that wait for others
``leaving``     sessions left by an exception
``sequences``   sequences for sessions
``pool_sequences``   those of a pool
``layer_sequences``  those in per-layer caches
``arguments``   checks of what comes in
``media``       images and sounds in prompts
``kept``        the spans of one prefix cache
``store_link``  fetched pages as spans, and spans as pages
``tiers``       the store behind a prefix cache
``fetching``    pages on their way from it
``writing_behind``  pages on their way to it
``paging``      pages cut out of snapshots, and put together
``costs``       whether fetching beats computing
``background``  threads with a bounded queue
``tier_stats``  totals of the store
``stored``      snapshots as payloads of spans
``index``       kept spans of tokens, within a budget
``trees``       how they are split, joined and filed
``candidates``  those of them that may be evicted
``retention``   priorities that fall with time
``quotas``      bytes of one salt
``policies``    the choice of a span to evict
``simulation``  policies on recorded requests
``radix``       a radix tree over token ids
``trie``        per-layer caches by the tokens they hold
``events``      stored and removed blocks, for routers
``block_hashes``  their names, as vLLM makes them
``publishing``  events over ZeroMQ
``metrics``     statistics for Prometheus
``residency``   how long spans stay
``usage``       reused tokens of one request, for APIs
``render``      a drawing of the tree
``marks``       why requests compute tokens, in the drawing
"""

from .block_hashes import adapter_salt
from .cache import PrefixCache
from .events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from .metrics import register_metrics
from .policies import EvictionPolicy
from .publishing import ZmqEventPublisher
from .reasons import Explanation, Reason, Why
from .residency import Residency
from .session import Session
from .stats import PrefixStats
from .stored import Hit
from .tier_stats import TierStats
from .trie import Entry, PrefixTrie
from .usage import Usage

__all__ = [
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "Entry",
    "Event",
    "EvictionPolicy",
    "Explanation",
    "Hit",
    "PrefixCache",
    "PrefixStats",
    "PrefixTrie",
    "Reason",
    "Residency",
    "Session",
    "TierStats",
    "Usage",
    "Why",
    "ZmqEventPublisher",
    "adapter_salt",
    "register_metrics",
]
