"""The rotating per-layer cache: the latest tokens, and the first ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

from kvcache._checks import NO_LIMIT, as_index, as_indices, as_room
from kvcache.backends import Backend
from kvcache.errors import NotSupportedError, TrimError
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.arrays import LayerArrays

from .arena import Ring
from .checkpoint import Checkpoint, Names
from .columns import Sizes
from .growing import KVCache
from .ring_programs import ExportableRing


class RotatingKVCache(ExportableRing):
    """Bounded cache for one layer: the first `keep` tokens and the latest others.

    A query sees itself, the ``max_size - keep - 1`` tokens before it, and the first `keep`
    tokens (attention sinks, StreamingLLM, arXiv:2309.17453), however many tokens an update
    brings: one of several tokens returns the columns of all their windows, and the mask tells
    them apart. Columns ascend by position, sinks first: ``max_size - 1`` of them and those of the
    update, more where the backend pads, or where a checkpoint or `slack` and sinks hold others.

    The tokens lie in buffers of about twice the window, and move to their front once per window.

    max_size: tokens that a query sees, sinks included. keep: sinks.
    slack: further tokens to hold, so that as many can be trimmed at any time.
    Others as for :class:`KVCache`; `capacity` beyond that of a full ring has no effect.
    """

    kind: ClassVar[str] = "rotating"
    _changing: ClassVar[Names] = (
        *KVCache._changing,
        "_ring",
        "_first",
        "_whole",
        "_lead",
        "_latest",
        "_wide",
    )

    def __init__(
        self,
        max_size: int,
        keep: int = 0,
        backend: str | Backend | None = None,
        step: int = 256,
        dtype: str | None = None,
        *,
        slack: int = 0,
        capacity: int = 0,
        layout: str = "bhtd",
    ) -> None:
        max_size, keep = as_index(max_size, "max_size"), as_index(keep, "keep")
        if max_size < 1:
            raise ValueError(f"max_size must be >= 1 token; got {max_size}.")
        if not 0 <= keep < max_size:
            raise ValueError(
                f"keep must be 0 to max_size - 1, so that a window is left; "
                f"got keep={keep} with max_size={max_size}."
            )
        # A larger ring never drops a token, and larger numbers do not fit the int32 of masks.
        self.max_size = min(max_size, NO_LIMIT)
        self.keep = min(keep, self.max_size - 1)
        self.slack = min(as_room(slack, "slack"), NO_LIMIT)
        self._window = self.max_size - self.keep
        # A buffer never outgrows the ring, whatever its step.
        step = min(as_index(step, "step"), NO_LIMIT)
        self._configure(backend, step, dtype, capacity, layout)

    def _start(self) -> None:
        super()._start()
        self._ring = Ring(self._window, self.keep, self.slack)
        self._first, self._whole = 0, 0
        self._lead, self._latest, self._wide = 0, 0, None

    @property
    def options(self) -> Mapping[str, int | str | None]:
        slack = {"slack": self.slack} if self.slack else {}
        return {"max_size": self.max_size, "keep": self.keep, **super().options, **slack}

    @property
    def len(self) -> int:
        all_held = self._first <= self._ring.keep
        return self._offset if all_held else self._offset - self._first + self._sinks

    def _sizes(self) -> Sizes:
        if self._buffers is None and self.backend is not None:
            return self._ring.sizes(self.backend, self._step)
        return super()._sizes()

    # Masks.

    def _maskable(self) -> int:
        return self._offset if self._first <= self._ring.keep else max(1, self._latest)

    def _attended(self, window: int | None) -> Visibility:
        return Visibility(min(window or self._window, self._window) - 1, sinks=self.keep)

    # Snapshots.

    def capture(self, start: int, stop: int) -> TokenRows:
        self._check_whole()
        return super().capture(start, stop)

    def to_layer(self) -> LayerArrays:
        self._check_whole()
        return super().to_layer()

    def _check_whole(self) -> None:
        """Raise NotSupportedError where rows lack tokens that snapshots and files would show."""
        if self._whole and self._first <= self._ring.keep:
            more = self._ring.keep + self._window + self.slack + 1 - self._offset
            raise NotSupportedError(
                "rows with sinks, joined after some had dropped tokens that others hold, have no "
                f"snapshots or files before {more} more tokens came. Use those of split()."
            )

    @property
    def visibility(self) -> Visibility:
        # One more than the next token sees: files and snapshots have a full window.
        return Visibility(self._window, sinks=self._sinks)

    def schedule(self, positions: Iterable[int]) -> None:
        self.check_not_exported()
        # Rows for earlier positions may be dropped already: too late to retain them.
        points = as_indices(positions, "positions")
        self._points.schedule(point for point in points if point >= self._offset)

    # Going back.

    def can_trim(self, tokens: int) -> bool:
        tokens = as_index(tokens, "tokens")
        needed = self._offset - tokens - self._window
        held = self._first <= self._ring.keep or needed >= self._first
        held = held and (not self._whole or needed >= self._whole)
        return super().can_trim(tokens) and (tokens == 0 or held)

    def check_trim(self, tokens: int) -> None:
        tokens = as_index(tokens, "tokens")
        if super().can_trim(tokens) and not self.can_trim(tokens):
            most = max(0, self._offset - self._window - max(self._first, self._whole))
            raise TrimError(
                f"a rotating cache cannot trim once tokens were displaced: {self._offset} came, "
                f"it holds {self.len}. Use checkpoint() and rollback(), or a cache with slack for "
                f"as many: this one takes back 0 to {most} tokens; got {tokens}."
            )
        super().check_trim(tokens)

    def _rewind(self, offset: int) -> None:
        super()._rewind(offset)
        self._show_held()

    def checkpoint(self) -> None:
        super().checkpoint()
        if self._checkpoint is not None:
            self._checkpoint = replace(self._checkpoint, first=self._first)

    def _return_to(self, checkpoint: Checkpoint, accepted: int) -> None:
        def go_back() -> None:
            offset = checkpoint.offset + accepted
            self._first = max(checkpoint.first, self._ring.first(offset))
            self._rewind(offset)

        self._atomic(go_back)
