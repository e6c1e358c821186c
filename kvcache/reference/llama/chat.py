"""Conversations with the reference model, every turn of which goes on from the ones before."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, TypeAlias

from kvcache import CausalCache, KVCache
from kvcache.prefix import PrefixCache, Session

from .generate import generate, make_caches
from .model import Llama
from .pooled import Part, PooledPass
from .tokenizer import Tokenizer

__all__ = ["Chat", "Conversation", "Turn"]

Kind: TypeAlias = Literal["kv", "rotating", "pool"]


class Conversation:
    """Turns as token ids. What was said stays as the very tokens that were said.

    A reply that is encoded again from its text may become other tokens, and nothing of them would
    be found; so only what the chat template puts around it is encoded.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._messages = [{"role": "system", "content": system}] if system else []
        self._ids: list[int] = []
        self._said = ""

    def ask(self, text: str) -> list[int]:
        """Token ids of all turns so far and this one, ready for the answer."""
        self._messages.append({"role": "user", "content": text})
        whole = self._tokenizer.render_chat(self._messages)
        if not whole.startswith(self._said):  # a template that rewrites what was said
            self._ids, self._said = [], ""
        self._ids += self._tokenizer.encode(whole.removeprefix(self._said), special=True)
        self._said = whole
        return list(self._ids)

    def answer(self, ids: Sequence[int]) -> str:
        """Take the model's answer; returns its text."""
        text = self._tokenizer.decode(ids)
        self._messages.append({"role": "assistant", "content": text})
        self._ids += ids
        self._said += text
        return text


@dataclass
class Turn:
    """What one answer took. Times are seconds to the first token."""

    prompt: list[int]
    """Token ids of the prompt, all turns before included."""
    reused: int = 0
    """Those of them that did not have to be computed."""
    seconds: float = 0.0
    cold_seconds: float | None = None
    """The same without reuse, if that was measured."""
    tokens: list[int] = field(default_factory=list)
    """The answer."""


class Chat:
    """Answers prompts greedily with a model, through a prefix cache.

    kind: ``"kv"`` and ``"rotating"`` use per-layer caches, ``"pool"`` one multi-sequence cache.
    max_size, keep: of a rotating cache. capacity: tokens of a sequence in a pool.
    budget: bytes that all turns may take. compare: measure each turn without reuse, too.
    """

    def __init__(
        self,
        model: Llama,
        kind: Kind = "kv",
        *,
        max_size: int = 1024,
        keep: int = 4,
        capacity: int = 4096,
        dtype: str = "float32",
        budget: int = 1 << 30,
        policy: str = "lru",
        eos_id: int | None = None,
        compare: bool = False,
    ) -> None:
        self._eos, self._compare = eos_id, compare
        self._runs: _Layers | _Pool
        if kind == "pool":
            self._runs = _Pool(model, capacity, dtype)
        else:
            self._runs = _Layers(model, kind, max_size, keep, dtype)
        self.prefix = PrefixCache(
            self._runs.cache, budget=budget, policy=policy, sequences=[0], namespace=dtype
        )

    def reply(self, turn: Turn, max_tokens: int = 64) -> Iterator[int]:
        """Yield the tokens of the answer as they come, and write down what they took in `turn`.

        Raises: with the first token, ValueError for an empty prompt, CacheFullError for one that a
            pool has no room for.
        """
        if self._compare:
            turn.cold_seconds = _seconds_to_first(self._runs.cold(turn.prompt))
        started = time.perf_counter()
        with self.prefix.session(turn.prompt) as session:
            turn.reused = session.matched
            for token in self._runs.tokens(session):
                if not turn.tokens:
                    turn.seconds = time.perf_counter() - started
                if token == self._eos:
                    break
                turn.tokens.append(token)
                yield token
                if len(turn.tokens) == max_tokens:
                    break
            session.extend(turn.tokens)


def _seconds_to_first(tokens: Iterator[int]) -> float:
    started = time.perf_counter()
    next(tokens)
    return time.perf_counter() - started


class _Layers:
    """Tokens through caches of a session's own."""

    def __init__(self, model: Llama, kind: Kind, max_size: int, keep: int, dtype: str) -> None:
        self._model = model
        sizes: Any = {"max_size": max_size, "keep": keep, "dtype": dtype}
        made = make_caches(
            model.backend, model.config, "rotating" if kind == "rotating" else "kv", **sizes
        )
        self.cache = made or []

    def tokens(self, session: Session) -> Iterator[int]:
        return self._tokens(session.remaining.tolist(), session.caches)

    def cold(self, prompt: Sequence[int]) -> Iterator[int]:
        return self._tokens(list(prompt), [cache.copy() for cache in self.cache])

    def _tokens(self, ids: list[int], caches: Sequence[KVCache]) -> Iterator[int]:
        # Where each length is compiled by itself.
        few = not self._model.backend.slices_are_views
        *before, last = pieces(len(ids), 512, few)
        for start, stop in before:
            self._model.backend.sync(self._model([ids[start:stop]], caches))
        yield from generate(self._model, ids[slice(*last)], caches, sys.maxsize)


class _Pool:
    """Tokens through sequences of one cache; 0 is that of sessions, 1 of turns without reuse."""

    def __init__(self, model: Llama, capacity: int, dtype: str) -> None:
        self.cache = CausalCache()
        sizes = {"max_sequences": 2, "capacity": capacity, "max_batch": 512}
        self.cache.init(model.backend, dtype, **sizes)
        self._pass = PooledPass(model, self.cache, dtype)

    def tokens(self, session: Session) -> Iterator[int]:
        return self._tokens(session.sequence, session.matched, session.remaining.tolist())

    def cold(self, prompt: Sequence[int]) -> Iterator[int]:
        self.cache.remove(1, 0)
        yield from self._tokens(1, 0, list(prompt))

    def _tokens(self, sequence: int, position: int, ids: list[int]) -> Iterator[int]:
        for start, stop in pieces(len(ids), 512, few=False):
            found = self._pass(
                [Part(sequence, position + start, ids[start:stop], stop == len(ids))]
            )
        for place in count(position + len(ids)):
            [token] = found
            yield token
            found = self._pass([Part(sequence, place, [token], True)])


def pieces(count: int, size: int, few: bool) -> Iterator[tuple[int, int]]:
    """``[0, count)`` in pieces of `size` at most; of powers of two where lengths are to be few."""
    start = 0
    while start < count:
        length = min(size, count - start)
        stop = start + (1 << (length.bit_length() - 1) if few else length)
        yield start, stop
        start = stop
