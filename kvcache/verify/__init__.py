"""Warm equals cold: a bench for any cache that is reused, trimmed, forked or evicted.

::

    from kvcache.verify import verify

    report = verify(MyTarget(), runs=20)
    print(report.to_text())

``kvcache verify`` is the same from the command line, and :func:`kvcache.testing.verify_reuse` for
tests. A target puts a cache with its model behind a few calls:

``target``      :class:`Target`, what a cache has to offer, and what it may
``operations``  what a program does with conversations
``scenarios``   conversations by kind, generated from a seed
``play``        runs a conversation on a target
``cold``        cold runs of the same passes, and their noise
``compare``     differences between logits
``judge``       compares both, and names the first wrong token
``shrink``      finds the shortest conversation that shows a fault
``report``      verdicts as text, JSON, XML of JUnit
``run``         all of it
``targets``     caches of kvcache, transformers and mlx-lm, and servers
"""

from .judge import Divergence
from .report import Finding, Report, ScenarioResult
from .run import verify, verify_reuse
from .scenarios import SCENARIOS, Scenario
from .target import Ability, Chunks, Conversation, Target, Trial

__all__ = [
    "SCENARIOS",
    "Ability",
    "Chunks",
    "Conversation",
    "Divergence",
    "Finding",
    "Report",
    "Scenario",
    "ScenarioResult",
    "Target",
    "Trial",
    "verify",
    "verify_reuse",
]
