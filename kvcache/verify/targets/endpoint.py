"""Servers that complete prompts and return logprobs, by the protocol of OpenAI's completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from itertools import count
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np

from kvcache.backends import HostArray
from kvcache.errors import KVCacheError
from kvcache.verify.target import Ability, Chunks, Conversation, Target, Trial

_COLUMNS = 4096
_TIMEOUT = 120.0
Json: TypeAlias = Any
"""A value of an answer, as another program made it."""
Body: TypeAlias = Mapping[str, Json]


class EndpointError(KVCacheError, OSError):
    """A server that cannot be reached, refuses a request, or answers without logprobs."""


class EndpointTarget(Target):
    """A server, by its answers to ``POST {url}/completions``.

    url: up to ``/v1``.
    cold_url: of the same model on a server that reuses nothing; `url` by default.
    cold: options of a request that reuses nothing: ``{"cache_prompt": False}`` (llama.cpp),
        ``{"cache_salt": "{unique}"}`` (vLLM). ``{unique}`` in a text is replaced by another number
        each time.
    warm: options of all others. ``{trial}`` and ``{tenant}`` in a text are replaced by numbers.
        Without the first, what one conversation left is found by the next.
    options: of every request: ``model``, ``seed``.
    vocab_size: ids of prompts are below it. render: makes a prompt of ids, for a server that takes
        texts only; ids by default.
    top: logprobs to ask for, of the likeliest tokens.

    A request tells the logprobs of one token: the one behind the prompt. A conversation goes on by
    prompts that get longer, and how a prompt is cut into passes is up to the server.

    Raises: ValueError without a way to have something computed cold.
    """

    partial = True

    def __init__(
        self,
        url: str,
        *,
        cold_url: str | None = None,
        cold: Body | None = None,
        warm: Body | None = None,
        options: Body | None = None,
        vocab_size: int = 1000,
        render: Callable[[Sequence[int]], object] = list,
        top: int = 5,
        max_tokens: int = 256,
    ) -> None:
        if cold_url is None and not cold:
            raise ValueError(
                "cold runs need a server that reuses nothing, or options of a request that does. "
                "Name cold_url, or cold: {'cache_salt': '{unique}'} for vLLM, say."
            )
        self.name = f"server {url}"
        self.vocab_size, self.max_tokens, self.top = vocab_size, max_tokens, top
        self.edges = tuple(size for size in (16, 64) if size < max_tokens)
        self.warm, self.render = warm or {}, render
        self._url, self._cold_url, self._cold = url, cold_url or url, cold or {}
        self._options = options or {}
        self._columns: dict[object, int] = {}
        self._unique, self._whole_numbers = count(), True
        abilities = {Ability.REUSE, Ability.TRIM, Ability.FORK, Ability.CANCEL, Ability.BATCH}
        if any("{tenant}" in str(value) for value in self.warm.values()):
            abilities.add(Ability.TENANTS)
        self.abilities = frozenset(abilities)

    def trial(self) -> Trial:
        return _EndpointTrial(self, next(self._unique))

    def cold(self, chunks: Chunks) -> list[HostArray]:
        ids: list[int] = []
        rows = []
        for chunk in chunks:
            ids += chunk
            options = filled(self._cold, unique=next(self._unique))
            rows.append(self.ask(self._cold_url, ids, options)[0])
        return rows

    def ask_warm(self, ids: Sequence[int], options: Body) -> tuple[HostArray, int]:
        """Return logprobs behind `ids`, ``[1, columns]``, and the number of tokens reused."""
        return self.ask(self._url, ids, options)

    def ask(self, url: str, ids: Sequence[int], options: Body) -> tuple[HostArray, int]:
        """Ask a server; see :meth:`ask_warm`. Raises: EndpointError."""
        body = {"prompt": self.render(ids), "max_tokens": 1, "temperature": 0}
        body |= {**self._options, **options}
        answer: Json = None
        # Servers ask for logprobs in two ways. The one that was understood last comes first.
        for whole_number in (self._whole_numbers, not self._whole_numbers):
            asked = {"logprobs": self.top}
            if not whole_number:
                asked = {"logprobs": True, "top_logprobs": self.top}
            status, answer = self._post(url, body | asked)
            if status == 200:
                self._whole_numbers = whole_number
                break
        else:
            raise EndpointError(f"the server answered {status}: {json.dumps(answer)[:300]}.")
        return self._row(answer), _cached(answer)

    def cancel(self, ids: Sequence[int], options: Body) -> None:
        """Begin a request and close the connection when its answer begins."""
        body = {"prompt": self.render(ids), "max_tokens": 16, "temperature": 0, "stream": True}
        connection = self._connect(self._url)
        try:
            self._send(connection, self._url, {**body, **self._options, **options}).read(1)
        finally:
            connection.close()

    def _row(self, answer: Json) -> HostArray:
        row = np.full((1, _COLUMNS), np.nan)
        try:
            pairs = _logprobs(answer["choices"][0]["logprobs"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EndpointError(
                "a server has to return logprobs of the token behind a prompt; got "
                f"{json.dumps(answer)[:300]}."
            ) from error
        for label, logprob in pairs:
            column = self._columns.setdefault(label, len(self._columns))
            if column < _COLUMNS:
                row[0, column] = logprob
        return row

    def _post(self, url: str, body: Body) -> tuple[int, Json]:
        connection = self._connect(url)
        try:
            response = self._send(connection, url, body)
            text = response.read()
        except OSError as error:
            raise EndpointError(f"the server at {url} did not answer: {error}.") from error
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text.decode(errors="replace")

    def _send(self, connection: HTTPConnection, url: str, body: Body) -> HTTPResponse:
        path = f"{urlsplit(url).path.rstrip('/')}/completions"
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def _connect(self, url: str) -> HTTPConnection:
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=_TIMEOUT)


def filled(options: Body, **numbers: int) -> dict[str, Json]:
    """Return `options` with numbers in place of ``{name}`` in their texts."""
    made = dict(options)
    for name, value in options.items():
        if isinstance(value, str):
            for key, number in numbers.items():
                made[name] = made[name].replace(f"{{{key}}}", str(number))
    return made


def _logprobs(given: Json) -> list[tuple[object, float]]:
    """Return tokens and logprobs of the first token of an answer, in either form."""
    if "content" in given:
        first = given["content"][0]
        told = [first, *(first.get("top_logprobs") or ())]
        return [(item.get("id", item.get("token")), float(item["logprob"])) for item in told]
    pairs = dict(given["top_logprobs"][0] or {})
    pairs[given["tokens"][0]] = given["token_logprobs"][0]
    return [(token, float(logprob)) for token, logprob in pairs.items()]


def _cached(answer: Json) -> int:
    usage = answer.get("usage") or {}
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


class _EndpointTrial(Trial):
    def __init__(self, target: EndpointTarget, number: int) -> None:
        self.target, self.number = target, number

    def begin(self, ids: Sequence[int], tenant: int = 0) -> Conversation:
        options = filled(self.target.warm, trial=self.number, tenant=tenant)
        return _EndpointConversation(self.target, options, [])

    def together(self, rows: Sequence[tuple[Conversation, Sequence[int]]]) -> list[HostArray]:
        """Ask for all at the same time."""
        with ThreadPoolExecutor(len(rows)) as pool:
            return [*pool.map(lambda row: row[0].forward(row[1]), rows)]


class _EndpointConversation(Conversation):
    def __init__(self, target: EndpointTarget, options: Body, ids: Sequence[int]) -> None:
        self._target, self._options, self._ids = target, options, list(ids)
        self._reused = 0

    @property
    def held(self) -> int:
        return 0

    @property
    def reused(self) -> int:
        return self._reused

    def forward(self, ids: Sequence[int]) -> HostArray:
        row, self._reused = self._target.ask_warm([*self._ids, *ids], self._options)
        self._ids += ids
        return row

    def trim(self, count: int) -> None:
        del self._ids[len(self._ids) - count :]

    def fork(self) -> Conversation:
        return _EndpointConversation(self._target, self._options, self._ids)

    def cancel(self, ids: Sequence[int], layer: int) -> None:
        self._target.cancel([*self._ids, *ids], self._options)
