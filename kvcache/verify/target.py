"""The contract of a cache under test: the least that every cache can be put behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import TypeAlias

from kvcache.backends import HostArray
from kvcache.errors import NotSupportedError

Chunks: TypeAlias = tuple[tuple[int, ...], ...]
"""Token ids of a history, one tuple for each pass that computed some of them."""


class Ability(StrEnum):
    """An operation that a target declares; a scenario that needs another is "not supported"."""

    REUSE = "reuse"
    """A conversation begins with results of earlier ones."""
    TRIM = "trim"
    """Take back the last tokens."""
    DRAFT = "draft"
    """Compute tokens, and keep the first of them only."""
    FORK = "fork"
    """Go on in two ways."""
    CANCEL = "cancel"
    """Interrupt a pass."""
    BATCH = "batch"
    """Compute several conversations in one pass."""
    TENANTS = "tenants"
    """Keep conversations apart that share nothing."""
    REFERENCE = "reference"
    """Compute without any cache."""
    LAYERS = "layers"
    """Show the hidden states behind each layer."""


class Conversation(ABC):
    """One sequence of tokens in the caches of a :class:`Trial`."""

    @property
    @abstractmethod
    def held(self) -> int:
        """Tokens at the beginning of its prompt that need no :meth:`forward`, when it begins."""

    @property
    def reused(self) -> int:
        """Tokens of `held` that earlier conversations computed; all of them by default."""
        return self.held

    @abstractmethod
    def forward(self, ids: Sequence[int]) -> HostArray:
        """Compute `ids`, the next tokens, in one pass.

        Return logits, float ``[rows, vocab]``, behind the last `rows` of them: all, or fewer where
        the target shows no more.
        """

    def trim(self, count: int) -> None:
        """Take back the last `count` tokens; ability ``trim``."""
        raise _missing(Ability.TRIM)

    def can_trim(self, count: int) -> bool:
        """Return whether :meth:`trim` can take back so many tokens here."""
        return True

    def can_draft(self, count: int) -> bool:
        """Return whether :meth:`draft` can take back any of so many tokens here."""
        return True

    def draft(self, ids: Sequence[int], accepted: int) -> HostArray:
        """Compute `ids` in one pass, then keep the first `accepted`; ability ``draft``.

        Return logits as :meth:`forward` does.
        """
        raise _missing(Ability.DRAFT)

    def fork(self) -> Conversation:
        """Return another conversation that goes on from here; ability ``fork``."""
        raise _missing(Ability.FORK)

    def cancel(self, ids: Sequence[int], layer: int) -> None:
        """Begin a pass over `ids` and interrupt it in `layer`; ability ``cancel``.

        The conversation then stands where it did before the pass, by whatever the cache offers for
        that.
        """
        raise _missing(Ability.CANCEL)

    def end(self, store: bool) -> None:  # noqa: B027 - where nothing is stored, nothing ends
        """End it; keep its results for later conversations if `store`."""


class Trial(ABC):
    """Fresh caches of a target, for one run of operations. A context manager."""

    @abstractmethod
    def begin(self, ids: Sequence[int], tenant: int = 0) -> Conversation:
        """Begin a conversation with the prompt `ids`, one token at least."""

    def together(self, rows: Sequence[tuple[Conversation, Sequence[int]]]) -> list[HostArray]:
        """Compute the next tokens of several conversations in one pass; ability ``batch``.

        Return logits of each, as :meth:`Conversation.forward` does.
        """
        raise _missing(Ability.BATCH)

    def evict(self, tier: str) -> None:
        """Push everything that is stored and not in use out of `tier`, one of the target's."""
        raise NotSupportedError(f"this target has no tier {tier!r}; declare it in Target.tiers.")

    def close(self) -> None:  # noqa: B027 - most caches are freed when they are dropped
        """Free the caches."""

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Target(ABC):
    """A cache with the model that runs over it.

    name: stands in reports.
    vocab_size: token ids are below it.
    abilities: operations that its conversations have.
    tiers: places from which :meth:`Trial.evict` pushes results, as ``("device", "host")``.
    edges: windows, chunks and page sizes, in tokens: conversations end close to them.
    max_tokens: of a conversation.
    partial: whether NaN stands for a logit that the target does not tell.
    """

    name: str
    vocab_size: int
    abilities: frozenset[Ability] = frozenset()
    tiers: tuple[str, ...] = ()
    edges: tuple[int, ...] = ()
    max_tokens: int = 64
    partial: bool = False

    @abstractmethod
    def trial(self) -> Trial:
        """Return fresh caches."""

    def cold_trial(self) -> Trial:
        """Return fresh caches for one cold run, which nothing is reused of or kept for."""
        return self.trial()

    def cold(self, chunks: Chunks) -> list[HostArray]:
        """Return logits of each of `chunks`, in passes of their own, over fresh caches."""
        with self.cold_trial() as trial:
            conversation = trial.begin(chunks[0])
            outputs = [conversation.forward(chunks[0][conversation.held :])]
            outputs += [conversation.forward(chunk) for chunk in chunks[1:]]
            conversation.end(store=False)
        return outputs

    def reference(self, ids: Sequence[int]) -> HostArray:
        """Return logits behind each of `ids`, computed without a cache; ability ``reference``."""
        raise _missing(Ability.REFERENCE)

    def layers(self) -> AbstractContextManager[list[HostArray]]:
        """Fill a list with the hidden states ``[tokens, width]`` behind each layer of one pass.

        Ability ``layers``.
        """
        raise _missing(Ability.LAYERS)


def _missing(ability: Ability) -> NotSupportedError:
    return NotSupportedError(
        f"this target does not {ability.value}: it must not declare the ability, or implement it."
    )
