"""The state of a span of one sequence over all layers, taken out of a cache and put back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvcache.errors import KVCacheError, SnapshotMismatchError

from .archive import Record, read_archive, write_archive
from .rows import TokenRows
from .visibility import Visibility


class CacheSpec(NamedTuple):
    """Kind, resumption rule and dtype of a cache: equal for caches that exchange snapshots."""

    kind: str
    """Name of the kind of cache, as files give it."""
    visibility: Visibility
    """The rule for going on: :meth:`Visibility.needed`."""
    dtype: str


@dataclass
class Part:
    """The rows that one cache contributes to a snapshot."""

    spec: CacheSpec
    rows: TokenRows


class Snapshot:
    """Positions ``[start, stop)`` of one sequence, as far as its caches held them.

    ::

        with cache.snapshot(sequence) as snapshot:
            cache.remove(sequence, 0)
            ...
            cache.restore(sequence, snapshot)

    A resident snapshot owns no memory: it stays in the cache that it was taken from, and
    copies itself to the host right before something is written there. It can be restored to any
    cache of the same kind and dtype, on any backend. Whoever takes a snapshot closes it.

    Where every token stays (no window) a snapshot can be split anywhere, and each part of it is of
    use. Where old tokens are dropped it can be split as well, but a sequence can go on only at
    positions for which the tokens before are there: see :func:`last_resumable`.
    """

    def __init__(self, start: int, stop: int, parts: Sequence[Part]) -> None:
        self.start = start
        self.stop = stop
        self.parts = tuple(parts)

    def __repr__(self) -> str:
        form = "resident" if self.resident else "host"
        kinds = ", ".join(dict.fromkeys(spec.kind for spec in self.specs))
        return f"<Snapshot [{self.start}, {self.stop}) of {kinds}, {self.nbytes} bytes, {form}>"

    @property
    def specs(self) -> list[CacheSpec]:
        """Specs of the caches that the snapshot is of."""
        return [part.spec for part in self.parts]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, resident or not."""
        return sum(part.rows.nbytes for part in self.parts)

    @property
    def host_nbytes(self) -> int:
        """Bytes of memory that the snapshot owns: 0 while it is resident."""
        return sum(part.rows.host_nbytes for part in self.parts)

    @property
    def resident(self) -> bool:
        """Whether some of it is still in the memory of its cache."""
        return any(part.rows.owner is not None for part in self.parts)

    @property
    def resumable_anywhere(self) -> bool:
        """Whether the first part of it is of use without the second, wherever it is split."""
        return all(spec.visibility.resumable_anywhere for spec in self.specs)

    def empty_like(self, start: int, stop: int) -> Snapshot:
        """Return a snapshot of ``[start, stop)`` of the same caches that holds no position."""
        nothing = [TokenRows(part.rows.positions[:0]) for part in self.parts]
        return self._of(start, stop, nothing)

    def split(self, at: int) -> tuple[Snapshot, Snapshot]:
        """Return two snapshots that meet at position `at`; this one is closed.

        Raises: ValueError unless ``start < at < stop``.
        """
        if not self.start < at < self.stop:
            raise ValueError(
                f"a snapshot of [{self.start}, {self.stop}) is split inside; got {at}."
            )
        pairs = [part.rows.split(at) for part in self.parts]
        lower, upper = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return self._of(self.start, at, lower), self._of(at, self.stop, upper)

    def merge(self, other: Snapshot) -> Snapshot:
        """Return one snapshot of this and `other`, which begins where this ends; both are closed.

        Raises: ValueError if it does not, SnapshotMismatchError if it is of other caches.
        """
        if other.start != self.stop:
            raise ValueError(
                f"snapshots that merge meet; got [{self.start}, {self.stop}) and "
                f"[{other.start}, {other.stop})."
            )
        check_same_specs([self, other], self.specs)
        return self._joined(other, other.stop)

    def union(self, other: Snapshot) -> Snapshot:
        """Return a snapshot of the same span with the rows that either holds; both are closed.

        Raises: SnapshotMismatchError if `other` is of other caches.
        """
        check_same_specs([self, other], self.specs)
        for own_part, part in zip(self.parts, other.parts, strict=True):
            positions = part.rows.positions
            inside = (positions >= self.start) & (positions < self.stop)
            new = inside & ~np.isin(positions, own_part.rows.positions)
            if not new.all():
                part.rows = part.rows.narrowed(new)
        return self._joined(other, self.stop)

    def _joined(self, other: Snapshot, stop: int) -> Snapshot:
        pairs = zip(self.parts, other.parts, strict=True)
        return self._of(self.start, stop, [one.rows.join(two.rows) for one, two in pairs])

    def _of(self, start: int, stop: int, rows: Sequence[TokenRows]) -> Snapshot:
        """Return a snapshot of the same caches with other rows."""
        return Snapshot(start, stop, list(map(Part, self.specs, rows)))

    def to_host(self) -> Self:
        """Copy resident rows to host memory; returns the snapshot itself."""
        for part in self.parts:
            part.rows.to_host()
        return self

    def close(self) -> None:
        """Give up slots and memory. Closing twice is no error."""
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
        records = [
            Record(
                part.spec.kind,
                part.spec.visibility,
                part.spec.dtype,
                part.rows.positions,
                part.rows.to_host(),
            )
            for part in self.parts
        ]
        write_archive(path, (self.start, self.stop), records, tokens, fingerprint)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        tokens: npt.ArrayLike | None = None,
        fingerprint: str | None = None,
    ) -> Snapshot:
        """Return the snapshot saved in `path`, in host memory.

        tokens, fingerprint: those that it has to belong to, if given.

        Raises: SnapshotMismatchError if it does not, CacheFileError (damaged, foreign or newer
        file), FileNotFoundError.
        """
        (start, stop), records = read_archive(path, tokens, fingerprint)
        parts = [
            Part(
                CacheSpec(record.kind, Visibility(*record.visibility), record.dtype),
                TokenRows(record.positions, record.layers),
            )
            for record in records
        ]
        return cls(start, stop, parts)


def last_resumable(snapshots: Sequence[Snapshot], limit: int) -> int:
    """Return the last position up to `limit` to go on at once `snapshots` are restored.

    snapshots: of one sequence, in order, without gaps between them, the first from position 0.

    Every cache must be able to go on there. Returns 0 if there is no such position.
    """
    if not snapshots:
        return 0
    limit, before = min(limit, snapshots[-1].stop), -1
    columns = list(zip(*(snapshot.parts for snapshot in snapshots), strict=True))
    held = [np.concatenate([part.rows.positions for part in column]) for column in columns]
    # Each cache may lower the limit for those before it, until all agree.
    while limit != before:
        before = limit
        for column, positions in zip(columns, held, strict=True):
            limit = column[0].spec.visibility.last_resumable(positions, limit)
    return limit


def check_same_specs(snapshots: Sequence[Snapshot], wanted: list[CacheSpec]) -> None:
    """Raise SnapshotMismatchError unless all are of caches with these specs."""
    for snapshot in snapshots:
        if snapshot.specs != wanted:
            got = [tuple(spec) for spec in snapshot.specs]
            raise SnapshotMismatchError(
                "a snapshot goes back to caches of the same kinds, windows and dtype; "
                f"got {got} for {[tuple(spec) for spec in wanted]}."
            )


def check_contiguous(snapshots: Sequence[Snapshot], wanted: list[CacheSpec]) -> int:
    """Return the position at which a sequence goes on once `snapshots` are restored.

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
