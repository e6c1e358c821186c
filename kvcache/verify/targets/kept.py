"""Reuse where a library leaves it to its users: caches are kept, copied and cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar

from kvcache.verify.target import Conversation, Trial

C = TypeVar("C", bound="KeptConversation")


class OwnCacheConversation(Conversation):
    """A conversation with a cache of its own, which holds `ids`."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self._held = len(ids)

    @property
    def held(self) -> int:
        return self._held


class KeptConversation(OwnCacheConversation):
    """A conversation that its trial keeps, with its cache, when it ends."""

    trial: KeptTrial[Any]

    @abstractmethod
    def copied(self) -> Self:
        """Return another conversation of the trial, with a copy of the cache."""

    def begin(self) -> None:
        """Take the tokens that the cache has for the beginning of a prompt."""
        self._held = len(self.ids)

    def fork(self) -> Conversation:
        return self.copied()

    def end(self, store: bool) -> None:
        if store:
            self.trial.keep(self)


class KeptTrial(Trial, Generic[C]):
    """Conversations that ended, kept for others that begin alike."""

    def __init__(self) -> None:
        self._kept: list[C] = []

    @abstractmethod
    def new(self) -> C:
        """Return a conversation without tokens."""

    def begin(self, ids: Sequence[int], tenant: int = 0) -> Conversation:
        conversation = self._nearest(ids) or self.new()
        conversation.begin()
        return conversation

    def keep(self, conversation: C) -> None:
        """Keep a conversation that has ended."""
        self._kept.append(conversation)

    def _nearest(self, ids: Sequence[int]) -> C | None:
        """Return a copy of a kept conversation with as many of the first `ids` as possible.

        One token at least is left to compute. None if there is no such conversation.
        """
        limit = len(ids) - 1
        common = [
            (min(limit, common_length(kept.ids, ids)), n) for n, kept in enumerate(self._kept)
        ]
        for length, number in sorted(common, key=lambda item: (-item[0], item[1])):
            kept = self._kept[number]
            if length and (shorter := _shortened(kept, len(kept.ids) - length)) is not None:
                return shorter
        return None


def _shortened(kept: C, count: int) -> C | None:
    """Return a copy of a conversation without its last `count` tokens; None if it cannot go back.

    A copy, as a cache that is asked whether it can go back may take note of that.
    """
    copied = kept.copied()
    if not count:
        return copied
    if not copied.can_trim(count):
        return None
    copied.trim(count)
    return copied


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    pairs = zip(one, other, strict=False)  # of any two lengths
    shorter = min(len(one), len(other))
    return next((n for n, (first, second) in enumerate(pairs) if first != second), shorter)
