"""The operations of which a script is made: what a program does with conversations.

Conversations are named by slots, and a prompt by the tokens of an earlier one, so that a script
stays a script when operations and tokens are left out: one that finds nothing to work on is passed
over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Begin:
    """Begin a conversation in `slot`, and compute what is left of its prompt.

    The prompt is the first `keep` tokens of what `source` last had, `more`, and what `source` had
    from position `rest` on. sizes: tokens of each pass, in turn; () for one pass.
    """

    slot: int
    more: Ids
    source: int | None = None
    keep: int = 0
    rest: int | None = None
    sizes: Ids = ()
    tenant: int = 0


@dataclass(frozen=True)
class Feed:
    """Compute further tokens, in passes of `sizes` in turn; () for one pass."""

    slot: int
    ids: Ids
    sizes: Ids = ()


@dataclass(frozen=True)
class Trim:
    """Take back the last `count` tokens, if there are more."""

    slot: int
    count: int


@dataclass(frozen=True)
class Draft:
    """Compute `ids` in one pass, and keep the first `accepted` of them."""

    slot: int
    ids: Ids
    accepted: int


@dataclass(frozen=True)
class Fork:
    """Go on in `target` from where `slot` is, and in `slot` as well."""

    slot: int
    target: int


@dataclass(frozen=True)
class Cancel:
    """Interrupt a pass over `ids` in `layer`."""

    slot: int
    ids: Ids
    layer: int = 1


@dataclass(frozen=True)
class End:
    """End a conversation, and store its results or not."""

    slot: int
    store: bool = True


@dataclass(frozen=True)
class Evict:
    """Push what is stored out of a tier."""

    tier: str


@dataclass(frozen=True)
class Together:
    """Compute tokens of several conversations in one pass."""

    slots: Ids
    ids: tuple[Ids, ...]


Operation: TypeAlias = Begin | Feed | Trim | Draft | Fork | Cancel | End | Evict | Together
Script: TypeAlias = tuple[Operation, ...]


def describe(script: Script) -> list[str]:
    """Return a line of text for each operation; those are Python, to be run again."""
    return [repr(operation) for operation in script]
