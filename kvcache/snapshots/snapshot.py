"""The state of a span of one sequence over all layers, taken out of a cache and put back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvcache.backends import HostArray
from kvcache.errors import ForeignFileError, KVCacheError, SnapshotMismatchError

from .files import read_file, write_file
from .rows import LayerRows, TokenRows, Visibility


@dataclass
class Part:
    """What one cache has to do with a snapshot. kind: of that cache, as files call it."""

    kind: str
    visibility: Visibility
    rows: TokenRows
    dtype: str

    def like(self, rows: TokenRows) -> Part:
        """The same with other rows."""
        return Part(self.kind, self.visibility, rows, self.dtype)


class Snapshot:
    """Positions ``[start, stop)`` of one sequence, as far as its caches held them.

    ::

        with cache.snapshot(sequence) as snapshot:
            cache.remove(sequence, 0)
            ...
            cache.restore(sequence, snapshot)

    A snapshot that is resident owns no memory: it stays in the cache that it was taken from, and
    copies itself to the host right before something is written there. It can be restored to any
    cache of the same kind and dtype, on any backend. Whoever takes one closes it.

    Where every token stays (no window) a snapshot can be split anywhere, and each part of it is of
    use. Where old ones are dropped it can be split as well, but a sequence can go on only at
    places for which the tokens before are there: see :func:`last_resumable`.
    """

    def __init__(self, start: int, stop: int, parts: Sequence[Part]) -> None:
        self.start = start
        self.stop = stop
        self.parts = tuple(parts)

    def __repr__(self) -> str:
        where = "resident" if self.resident else "host"
        kinds = ", ".join(dict.fromkeys(part.kind for part in self.parts))
        return f"<Snapshot [{self.start}, {self.stop}) of {kinds}, {self.size} bytes, {where}>"

    @property
    def size(self) -> int:
        """Bytes of all rows, wherever they are."""
        return sum(part.rows.nbytes for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it owns: 0 while it is resident."""
        return sum(part.rows.host_nbytes for part in self.parts)

    @property
    def resident(self) -> bool:
        """Whether some of it is still in the memory of its cache."""
        return any(part.rows.owner is not None for part in self.parts)

    @property
    def resumable_anywhere(self) -> bool:
        """Whether the first part of it is of use without the second, wherever it is split."""
        return all(part.visibility.window in (None, 0) for part in self.parts)

    def split(self, at: int) -> tuple[Snapshot, Snapshot]:
        """Two snapshots that meet at position `at`, instead of this one, which is closed.

        Raises: ValueError unless ``start < at < stop``.
        """
        if not self.start < at < self.stop:
            raise ValueError(
                f"a snapshot of [{self.start}, {self.stop}) is split inside; got {at}."
            )
        pairs = [part.rows.split(at) for part in self.parts]
        lower, upper = (
            [part.like(pair[side]) for part, pair in zip(self.parts, pairs, strict=True)]
            for side in (0, 1)
        )
        return Snapshot(self.start, at, lower), Snapshot(at, self.stop, upper)

    def merge(self, other: Snapshot) -> Snapshot:
        """One snapshot instead of this and `other`, which goes on where this ends; both are closed.

        Raises: ValueError if it does not, SnapshotMismatchError if it is of other caches.
        """
        if other.start != self.stop:
            raise ValueError(
                f"snapshots that merge meet; got [{self.start}, {self.stop}) and "
                f"[{other.start}, {other.stop})."
            )
        check_same_specs([self, other], specs_of(self.parts))
        return Snapshot(self.start, other.stop, self._joined(other))

    def union(self, other: Snapshot) -> Snapshot:
        """One snapshot of the span of this with what either holds; both are closed."""
        check_same_specs([self, other], specs_of(self.parts))
        for mine, part in zip(self.parts, other.parts, strict=True):
            inside = (part.rows.positions >= self.start) & (part.rows.positions < self.stop)
            new = inside & ~np.isin(part.rows.positions, mine.rows.positions)
            if not new.all():
                rows = part.rows
                part.rows = rows.take(np.flatnonzero(new))
                rows.close()
        return Snapshot(self.start, self.stop, self._joined(other))

    def _joined(self, other: Snapshot) -> list[Part]:
        pairs = zip(self.parts, other.parts, strict=True)
        return [mine.like(mine.rows.join(part.rows)) for mine, part in pairs]

    def to_host(self) -> Self:
        """Copy what is resident to host memory; the snapshot itself."""
        for part in self.parts:
            part.rows.to_host()
        return self

    def close(self) -> None:
        """Give up all it holds. Closing twice is no error."""
        for part in self.parts:
            part.rows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Files.

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        tokens: npt.ArrayLike | None = None,
        fingerprint: str = "",
    ) -> None:
        """Write it to a safetensors file, with a checksum of every tensor.

        tokens: ids up to `stop` that it belongs to; only a hash of them is kept.
        fingerprint: of the model and its weights, whatever tells them apart.
        """
        tensors: dict[str, HostArray] = {}
        for number, part in enumerate(self.parts):
            tensors[f"{number}.positions"] = part.rows.positions
            tensors |= _named(number, part.rows.to_host())
        header = {
            "kind": "snapshot",
            "span": [self.start, self.stop],
            "parts": [
                {"kind": part.kind, "visibility": list(part.visibility), "dtype": part.dtype}
                for part in self.parts
            ],
            "tokens": _token_hash(tokens),
            "fingerprint": fingerprint,
        }
        write_file(path, tensors, header)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        tokens: npt.ArrayLike | None = None,
        fingerprint: str | None = None,
    ) -> Snapshot:
        """The snapshot saved in `path`, in host memory.

        tokens, fingerprint: what it has to belong to, if given.

        Raises: SnapshotMismatchError if it does not, CacheFileError (damaged, foreign or newer
        file), FileNotFoundError.
        """
        header, tensors = read_file(path)
        if header.get("kind") != "snapshot":
            raise ForeignFileError(f"{path} holds whole caches, no snapshot. Use kvcache.load.")
        _check_owner(path, header, tokens, fingerprint)
        parts = [
            Part(
                each["kind"],
                Visibility(*each["visibility"]),
                TokenRows(tensors[f"{number}.positions"], _layers(number, tensors)),
                each["dtype"],
            )
            for number, each in enumerate(header["parts"])
        ]
        start, stop = header["span"]
        return cls(start, stop, parts)


def last_resumable(snapshots: Sequence[Snapshot], limit: int) -> int:
    """The last position up to `limit` where a sequence can go on that `snapshots` are put into.

    snapshots: of one sequence, in order, without gaps between them, the first from position 0.
    0 if there is no place.
    """
    if not snapshots:
        return 0
    limit, before = min(limit, snapshots[-1].stop), -1
    columns = list(zip(*(snapshot.parts for snapshot in snapshots), strict=True))
    held = [np.concatenate([part.rows.positions for part in column]) for column in columns]
    while limit != before:
        before = limit
        for column, positions in zip(columns, held, strict=True):
            limit = column[0].visibility.last_resumable(positions, limit)
    return limit


class CacheSpec(NamedTuple):
    """Kind, visibility and dtype of one cache: equal for caches that exchange snapshots."""

    kind: str
    visibility: Visibility
    dtype: str


def specs_of(parts: Sequence[Part]) -> list[CacheSpec]:
    """What snapshots must have in common with a cache, or with each other."""
    return [CacheSpec(part.kind, part.visibility, part.dtype) for part in parts]


def check_same_specs(snapshots: Sequence[Snapshot], wanted: list[CacheSpec]) -> None:
    """Raise SnapshotMismatchError unless all are of caches like `wanted`."""
    for snapshot in snapshots:
        if specs_of(snapshot.parts) != wanted:
            raise SnapshotMismatchError(
                "a snapshot goes back to caches of the same kinds, windows and dtype; "
                f"got {specs_of(snapshot.parts)} for {wanted}."
            )


def check_contiguous(snapshots: Sequence[Snapshot], wanted: list[CacheSpec]) -> int:
    """Where a sequence goes on that `snapshots` are put into.

    Raises: SnapshotMismatchError, ValueError unless they follow each other from position 0,
        KVCacheError if it cannot go on at the end of the last.
    """
    check_same_specs(snapshots, wanted)
    spans = [(snapshot.start, snapshot.stop) for snapshot in snapshots]
    starts = [0, *(stop for _, stop in spans[:-1])]
    if not spans or [start for start, _ in spans] != starts:
        raise ValueError(f"snapshots to restore follow each other from position 0; got {spans}.")
    stop = spans[-1][1]
    if (possible := last_resumable(snapshots, stop)) != stop:
        raise KVCacheError(
            f"the tokens before position {stop} that its cache would see are not all in these "
            f"snapshots; the last place to go on is {possible}. Split them there."
        )
    return stop


def _named(number: int, layers: LayerRows) -> dict[str, HostArray]:
    named = {}
    for layer, (keys, values) in layers.items():
        named[f"{number}.{layer}.keys"] = keys
        if values is not None:
            named[f"{number}.{layer}.values"] = values
    return named


def _layers(number: int, tensors: dict[str, HostArray]) -> LayerRows:
    layers = [int(name.split(".")[1]) for name in tensors if _is_keys(name, number)]
    return {
        layer: (tensors[f"{number}.{layer}.keys"], tensors.get(f"{number}.{layer}.values"))
        for layer in layers
    }


def _is_keys(name: str, number: int) -> bool:
    return name.startswith(f"{number}.") and name.endswith(".keys")


def _token_hash(tokens: npt.ArrayLike | None) -> str:
    if tokens is None:
        return ""
    return hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()


def _check_owner(
    path: str | os.PathLike[str],
    header: dict[str, Any],
    tokens: npt.ArrayLike | None,
    fingerprint: str | None,
) -> None:
    wrong = []
    if tokens is not None and header["tokens"] != _token_hash(tokens):
        wrong.append("tokens")
    if fingerprint is not None and header["fingerprint"] != fingerprint:
        wrong.append(f"model {header['fingerprint']!r}, not {fingerprint!r}")
    if wrong:
        raise SnapshotMismatchError(f"{path} belongs to other {' and '.join(wrong)}. Compute anew.")
