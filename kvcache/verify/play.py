"""Runs a script on a target, and notes the passes whose logits can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, singledispatchmethod
from itertools import cycle

from kvcache.backends import HostArray

from .operations import (
    Begin,
    Cancel,
    Draft,
    End,
    Evict,
    Feed,
    Fork,
    Ids,
    Operation,
    Script,
    Together,
    Trim,
)
from .target import Chunks, Conversation, Target, Trial

_MOST_CANDIDATES = 3


@dataclass(frozen=True)
class Observation:
    """The logits of one pass, and the ways in which a cold run may compute the same.

    operation: its number in the script. position: of the first row of `logits`. candidates: the
    passes that computed the history, this one last; several where it is not known which
    conversation the reused tokens are from. layers: hidden states behind each layer, if recorded.
    """

    operation: int
    position: int
    candidates: tuple[Chunks, ...]
    logits: HostArray
    layers: tuple[HostArray, ...] = ()

    @property
    def ids(self) -> Ids:
        """All tokens up to the last of the pass."""
        return joined(self.candidates[0])


@dataclass(frozen=True)
class Failure:
    """An operation that raised, or reused tokens that nobody of the tenant had computed."""

    operation: int
    message: str


@dataclass
class Played:
    """The outcome of a script: its passes in order, up to the failure if there is one.

    reused: tokens that were not computed. refused: operations that the cache could not do in the
    state that it had, and said so.
    """

    observations: list[Observation] = field(default_factory=list)
    failure: Failure | None = None
    reused: int = 0
    refused: int = 0


@dataclass
class _Talk:
    """A conversation that goes on, with the passes that may have computed it."""

    handle: Conversation
    candidates: list[Chunks]
    tenant: int

    @property
    def ids(self) -> Ids:
        return joined(self.candidates[0])

    def append(self, ids: Ids) -> None:
        self.candidates = [(*chunks, ids) for chunks in self.candidates]

    def cut(self, length: int) -> None:
        self.candidates = [first_tokens(chunks, length) for chunks in self.candidates]


class UnearnedReuseError(AssertionError):
    """Reuse of tokens that no conversation of the tenant has computed."""


def play(target: Target, script: Script, record: bool = False) -> Played:
    """Run `script` on fresh caches. record: whether to note the hidden states of every pass."""
    played = Played()
    with target.trial() as trial:
        player = _Player(target, trial, played, record)
        for number, operation in enumerate(script):
            player.number = number
            try:
                player.run(operation)
            except Exception as error:  # noqa: BLE001 - whatever a cache raises is a finding
                message = f"{type(error).__name__}: {error}"
                played.failure = Failure(number, message)
                break
        player.finish()
    return played


class _Player:
    """The conversations of one script."""

    def __init__(self, target: Target, trial: Trial, played: Played, record: bool) -> None:
        self._target, self._trial, self._played = target, trial, played
        self._record = record
        self._talks: dict[int, _Talk] = {}
        self._last: dict[int, Ids] = {}  # tokens of each slot, also after its end
        self._stored: list[tuple[int, Chunks]] = []
        self._computed: list[tuple[int, Ids]] = []
        self.number = 0

    def finish(self) -> None:
        """End what goes on, whatever state a failure has left it in."""
        for talk in self._talks.values():
            try:
                talk.handle.end(store=False)
            except Exception:  # noqa: BLE001, S112 - the failure before it is the finding
                continue

    @singledispatchmethod
    def run(self, operation: Operation) -> None:
        """Carry out one operation, or pass over it."""
        raise TypeError(f"a script is made of operations; got {operation!r}.")

    @run.register
    def _(self, operation: Begin) -> None:
        prompt = self._prompt(operation)
        if not prompt:
            return
        self._end(operation.slot, store=True)
        handle = self._trial.begin(prompt, operation.tenant)
        held = handle.held
        self._check_earned(operation.tenant, prompt, handle.reused)
        candidates = self._sources(operation.tenant, prompt, handle.reused)
        if held > handle.reused:  # computed by the conversation itself when it began
            candidates = [(*chunks, prompt[handle.reused : held]) for chunks in candidates]
        talk = self._talks[operation.slot] = _Talk(handle, candidates, operation.tenant)
        self._compute(talk, prompt[held:], operation.sizes)
        self._played.reused += handle.reused  # a server tells only now
        self._last[operation.slot] = talk.ids

    @run.register
    def _(self, operation: Feed) -> None:
        if talk := self._open(operation.slot, len(operation.ids)):
            self._compute(talk, operation.ids, operation.sizes)
            self._last[operation.slot] = talk.ids

    @run.register
    def _(self, operation: Trim) -> None:
        talk = self._open(operation.slot)
        if talk is None or not 0 < operation.count < len(talk.ids):
            return
        if not talk.handle.can_trim(operation.count):
            self._played.refused += 1
            return
        talk.handle.trim(operation.count)
        talk.cut(len(talk.ids) - operation.count)
        self._last[operation.slot] = talk.ids

    @run.register
    def _(self, operation: Draft) -> None:
        talk = self._open(operation.slot, len(operation.ids))
        if talk is None or not operation.ids:
            return
        if not talk.handle.can_draft(len(operation.ids)):
            self._played.refused += 1
            return
        accepted = min(operation.accepted, len(operation.ids))
        before = len(talk.ids)

        def call() -> HostArray:
            return talk.handle.draft(operation.ids, accepted)

        self._observe(talk, operation.ids, call)
        talk.cut(before + accepted)
        self._last[operation.slot] = talk.ids

    @run.register
    def _(self, operation: Fork) -> None:
        talk = self._open(operation.slot)
        if talk is None or operation.slot == operation.target:
            return
        self._end(operation.target, store=True)
        fork = talk.handle.fork()
        self._talks[operation.target] = _Talk(fork, list(talk.candidates), talk.tenant)
        self._last[operation.target] = talk.ids

    @run.register
    def _(self, operation: Cancel) -> None:
        talk = self._open(operation.slot, len(operation.ids))
        if talk is not None and operation.ids:
            self._computed.append((talk.tenant, (*talk.ids, *operation.ids)))
            talk.handle.cancel(operation.ids, operation.layer)

    @run.register
    def _(self, operation: End) -> None:
        self._end(operation.slot, operation.store)

    @run.register
    def _(self, operation: Evict) -> None:
        self._trial.evict(operation.tier)

    @run.register
    def _(self, operation: Together) -> None:
        rows: list[tuple[_Talk, Ids]] = []
        for slot, ids in dict(zip(operation.slots, operation.ids, strict=False)).items():
            talk = self._open(slot, len(ids))
            if talk is not None and ids:
                rows.append((talk, ids))
        if not rows:
            return
        outputs = self._trial.together([(talk.handle, ids) for talk, ids in rows])
        for (talk, ids), logits in zip(rows, outputs, strict=True):
            talk.append(ids)
            self._note(talk, logits)
        for slot in operation.slots:
            if slot in self._talks:
                self._last[slot] = self._talks[slot].ids

    def _prompt(self, operation: Begin) -> Ids:
        before = self._last.get(operation.source, ()) if operation.source is not None else ()
        after = before[operation.rest :] if operation.rest is not None else ()
        prompt = (*before[: operation.keep], *operation.more, *after)
        return prompt[: self._target.max_tokens]

    def _open(self, slot: int, tokens: int = 0) -> _Talk | None:
        """Return the conversation of `slot`; None without one, or room for more tokens in it."""
        talk = self._talks.get(slot)
        if talk is None or len(talk.ids) + tokens > self._target.max_tokens:
            return None
        return talk

    def _end(self, slot: int, store: bool) -> None:
        talk = self._talks.pop(slot, None)
        if talk is None:
            return
        talk.handle.end(store)
        if store:
            self._stored += [(talk.tenant, chunks) for chunks in talk.candidates]

    def _sources(self, tenant: int, prompt: Ids, length: int) -> list[Chunks]:
        """Return the ways in which the first `length` tokens may have been computed."""
        if not length:
            return [()]
        found: dict[Chunks, None] = {}
        # The other way round: a prefix cache keeps what it had.
        for owner, chunks in self._stored:
            if owner == tenant and joined(chunks)[:length] == prompt[:length]:
                found[first_tokens(chunks, length)] = None
        return [*found][:_MOST_CANDIDATES] or [(prompt[:length],)]

    def _check_earned(self, tenant: int, prompt: Ids, length: int) -> None:
        """Raise unless somebody of the tenant has computed the first `length` tokens."""
        wanted = prompt[:length]
        if length and not any(
            owner == tenant and ids[:length] == wanted for owner, ids in self._computed
        ):
            raise UnearnedReuseError(
                f"{length} tokens were reused that no conversation of the tenant has computed."
            )

    def _compute(self, talk: _Talk, ids: Ids, sizes: Ids) -> None:
        """Compute `ids` in passes, and note each."""
        for piece in pieces(ids, sizes):
            self._observe(talk, piece, partial(talk.handle.forward, piece))

    def _observe(self, talk: _Talk, ids: Ids, call: Callable[[], HostArray]) -> None:
        """Note the logits that `call` returns for the pass over `ids`."""
        layers: list[HostArray] = []
        if self._record:
            with self._target.layers() as layers:
                logits = call()
        else:
            logits = call()
        talk.append(ids)
        self._note(talk, logits, layers)

    def _note(self, talk: _Talk, logits: HostArray, layers: Sequence[HostArray] = ()) -> None:
        self._computed.append((talk.tenant, talk.ids))
        position = len(talk.ids) - len(logits)
        self._played.observations.append(
            Observation(self.number, position, tuple(talk.candidates), logits, tuple(layers))
        )


def pieces(ids: Ids, sizes: Ids) -> list[Ids]:
    """Cut `ids` into pieces of `sizes`, in turn; () for one piece."""
    cut: list[Ids] = []
    start = 0
    for size in cycle(sizes or (len(ids) or 1,)):
        if start >= len(ids):
            return cut
        cut.append(ids[start : start + size])
        start += size
    return cut


def joined(chunks: Chunks) -> Ids:
    """Return the ids of all `chunks`."""
    return tuple(token for chunk in chunks for token in chunk)


def first_tokens(chunks: Chunks, length: int) -> Chunks:
    """Return `chunks` up to `length` tokens; the last of them may be cut."""
    kept: list[tuple[int, ...]] = []
    for chunk in chunks:
        if length <= 0:
            break
        kept.append(chunk[:length])
        length -= len(chunk)
    return tuple(kept)
