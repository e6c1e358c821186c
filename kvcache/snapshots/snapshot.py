"""Snapshots: the state of a span of one sequence in all layers, to be restored later."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvcache._checks import as_index
from kvcache._types import Bools, Int32s
from kvcache.errors import SnapshotMismatchError

from . import archive
from .rows import LayerRows, TokenRows, close_all, detach_all, exchange, spill_all
from .visibility import Visibility


class CacheSpec(NamedTuple):
    """Kind, visibility and dtypes of a cache: equal where snapshots can be exchanged."""

    kind: str
    """Name of the kind of cache, as in files."""
    visibility: Visibility
    """Rule for the tokens needed to resume: :meth:`Visibility.needed`."""
    dtype: str | tuple[str, ...]  # of all arrays of a layer, or of each


@dataclass
class Part:
    """The rows of one cache in a snapshot."""

    spec: CacheSpec
    rows: TokenRows

    def needed_at(self, position: int) -> Bools:
        """Return which rows are needed to resume at `position`, behind them.

        All rows of a cache that drops none: it may use them wherever it goes on.
        """
        positions = self.rows.positions
        if self.spec.visibility.resumable_anywhere:
            return np.ones(positions.size, np.bool_)
        return self.spec.visibility.needed(positions, position)

    def needed_by(self, points: Int32s) -> Bools:
        """Return which rows are needed to resume at any of `points`, ascending, among them.

        All rows of a cache that drops none, as in :meth:`needed_at`.
        """
        positions = self.rows.positions
        if self.spec.visibility.resumable_anywhere:
            return np.ones(positions.size, np.bool_)
        return self.spec.visibility.needed_by(positions, points)


class Snapshot:
    """Positions ``[start, stop)`` of one sequence, as far as its caches held them.

    ::

        with cache.snapshot(sequence) as snapshot:
            cache.remove(sequence, 0)
            ...
            cache.restore(sequence, snapshot)

    A resident snapshot owns no memory: its rows stay in their cache, which spills them to the host
    just before it writes there. A snapshot can be restored to any cache of the same kind,
    visibility and dtype, on any backend. The caller that takes a snapshot closes it.

    A snapshot can be split anywhere, and a restore can stop inside it. Where every token stays (no
    window), a sequence can resume at every position. Where old tokens are dropped, it can resume
    only at positions with all the tokens needed before them: see
    :func:`~kvcache.snapshots.resuming.last_resumable`.
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
        """Specs of the caches of the snapshot, one for each part."""
        return [part.spec for part in self.parts]

    @property
    def _rows(self) -> list[TokenRows]:
        return [part.rows for part in self.parts]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, resident or not."""
        return sum(part.rows.nbytes for part in self.parts)

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory owned by the snapshot: 0 while all of it is resident."""
        return sum(part.rows.host_nbytes for part in self.parts)

    @property
    def resident(self) -> bool:
        """True while some of its rows are in the memory of their cache."""
        return any(part.rows.in_cache for part in self.parts)

    @property
    def resumable_anywhere(self) -> bool:
        """True if a sequence can resume at the split, wherever the snapshot is split."""
        return all(spec.visibility.resumable_anywhere for spec in self.specs)

    def empty_like(self, start: int, stop: int) -> Snapshot:
        """Return a snapshot of ``[start, stop)`` of the same caches, without any rows."""
        start, stop = as_index(start, "start"), as_index(stop, "stop")
        nothing = [TokenRows(part.rows.positions[:0]) for part in self.parts]
        return self._of(start, stop, nothing)

    def split(self, at: int) -> tuple[Snapshot, Snapshot]:
        """Split the snapshot into two at position `at`; closes this one.

        Raises: ValueError unless ``start < at < stop``.
        """
        at = as_index(at, "at")
        if not self.start < at < self.stop:
            raise ValueError(
                f"a snapshot of [{self.start}, {self.stop}) is split inside; got {at}."
            )
        rows = self._rows
        return exchange(
            rows,
            lambda: (piece for own_rows in rows for piece in own_rows.pieces(at)),
            lambda pieces: (
                self._of(self.start, at, pieces[::2]),
                self._of(at, self.stop, pieces[1::2]),
            ),
        )

    def merge(self, *others: Snapshot) -> Snapshot:
        """Join this snapshot and `others`, each adjacent to the one before; closes all of them.

        Raises: ValueError unless each starts at the stop of the one before, SnapshotMismatchError
            if one is of other caches.
        """
        merged = [self, *others]
        for snapshot, other in pairwise(merged):
            if other.start != snapshot.stop:
                raise ValueError(
                    f"snapshots that merge meet; got [{snapshot.start}, {snapshot.stop}) and "
                    f"[{other.start}, {other.stop})."
                )
        check_same_specs(merged, self.specs)
        columns = list(zip(*(snapshot._rows for snapshot in merged), strict=True))
        return exchange(
            [rows for column in columns for rows in column],
            lambda: map(TokenRows.merged, columns),
            lambda rows: self._of(self.start, merged[-1].stop, rows),
        )

    def needed_at(self, position: int) -> Snapshot:
        """Return a snapshot of the same span with only the rows needed to resume at `position`.

        position: not before the stop of this one, which stays as it is.
        """
        position = as_index(position, "position")
        if position < self.stop:
            raise ValueError(
                f"rows of [{self.start}, {self.stop}) are needed at {self.stop} or behind it; got "
                f"{position}. Split the snapshot there."
            )
        return self._only([part.needed_at(position) for part in self.parts])

    def needed_by(self, points: Int32s) -> Snapshot:
        """Return a snapshot of the same span with only the rows needed to resume at `points` in it.

        points: ascending, one at least; see :func:`~kvcache.snapshots.resuming.resume_points`.
        """
        return self._only([part.needed_by(points) for part in self.parts])

    def _only(self, kept: Sequence[Bools]) -> Snapshot:
        """Return a snapshot of the same span with the rows `kept` of each part."""
        return exchange(
            (),
            lambda: (
                part.rows.renewed() if own.all() else part.rows.take(np.flatnonzero(own))
                for part, own in zip(self.parts, kept, strict=True)
            ),
            lambda rows: self._of(self.start, self.stop, rows),
        )

    def union(self, other: Snapshot) -> Snapshot:
        """Return a snapshot of this span with the rows of either; closes both.

        Raises: SnapshotMismatchError if `other` is of other caches.
        """
        return self._joined(other, self._missing_of(other))

    def united(self, other: Snapshot) -> Snapshot:
        """Return :meth:`union` as an object of its own; both stay as they are."""
        return self._joined(other, self._missing_of(other), closing=False)

    def _missing_of(self, other: Snapshot) -> list[Bools]:
        """Return which rows of each part of `other` are in this span, and not held here.

        Raises: SnapshotMismatchError if `other` is of other caches.
        """
        check_same_specs([self, other], self.specs)
        new = []
        for own_part, part in zip(self.parts, other.parts, strict=True):
            positions = part.rows.positions
            inside = (positions >= self.start) & (positions < self.stop)
            # Rows can only be joined without a common position.
            new.append(inside & ~np.isin(positions, own_part.rows.positions))
        return new

    def _joined(
        self,
        other: Snapshot,
        new: Iterable[Bools],
        closing: bool = True,
    ) -> Snapshot:
        """Return a snapshot of this span with the rows of both.

        new: for each part of `other` which of its rows are meant.
        closing: close both then; if anything raises, neither has changed.
        """
        own_rows, rows = self._rows, other._rows
        return exchange(
            [*own_rows, *rows] if closing else (),
            lambda: map(TokenRows.joined, own_rows, rows, new),
            lambda joined: self._of(self.start, self.stop, joined),
        )

    def _of(self, start: int, stop: int, rows: Sequence[TokenRows]) -> Snapshot:
        """Return a snapshot of the same caches with other rows, one for each part."""
        return Snapshot(start, stop, list(map(Part, self.specs, rows)))

    def copy(self) -> Snapshot:
        """Return another snapshot of the same rows, to be closed apart from this one.

        Rows are not copied: their content never changes. ``copy.copy`` and ``copy.deepcopy`` do the
        same; a pickled snapshot has its rows on the host.
        """
        return exchange(
            (),
            lambda: (part.rows.renewed() for part in self.parts),
            lambda rows: self._of(self.start, self.stop, rows),
        )

    def __copy__(self) -> Snapshot:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, object]) -> Snapshot:
        return self.copy()

    def __reduce__(self) -> tuple[Callable[..., Snapshot], tuple[object, ...]]:
        parts = [(part.spec, part.rows.positions, part.rows.host_copies()) for part in self.parts]
        return _unpickled, (self.start, self.stop, parts)

    def to_host(self) -> Self:
        """Spill resident rows to host memory; return the snapshot itself."""
        spill_all(self._rows)
        return self

    def detach(self) -> Self:
        """Copy resident rows, so that they depend on no cache; return the snapshot itself.

        In the memory they are in, if that is the host's, and else to host memory.
        """
        detach_all(self._rows)
        return self

    def close(self) -> None:
        """Give up slots and memory. Closing twice is fine."""
        close_all(self._rows)

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
        """Write the snapshot to a safetensors file, with a checksum of every tensor.

        Resident rows stay resident. The file replaces an existing one, and keeps its permissions,
        only when complete and on the disk; a symbolic link is followed. Checksums find damage; they
        do not say who wrote the file.

        tokens: the ids of all tokens before `stop`, also of those before `start`, because what is
            held depends on them. Only a hash of them is kept.
        fingerprint: any text to tell the model and its weights from others.

        Raises: ValueError for another number of tokens, or ids that are no integers >= 0;
            TypeError for a fingerprint that is no text; FileAccessError if `path` leads to no
            regular file, or may not be written; FileNotFoundError without its directory; OSError,
            such as for a full disk.
        """
        archive.check_tokens(tokens, self.stop)
        archive.check_fingerprint(fingerprint)
        records = [
            archive.Record(
                part.spec.kind,
                part.spec.visibility,
                part.spec.dtype,
                part.rows.positions,
                part.rows.content(),
            )
            for part in self.parts
        ]
        archive.write_archive(path, (self.start, self.stop), records, tokens, fingerprint)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        tokens: npt.ArrayLike | None = None,
        fingerprint: str | None = None,
    ) -> Snapshot:
        """Return the snapshot saved in `path`, in host memory.

        tokens, fingerprint: those it must have been saved with; None accepts any.

        Raises: ValueError, TypeError for `tokens` or a `fingerprint` that no snapshot can be saved
            with; SnapshotMismatchError for other tokens or another model, CacheFileError (damaged,
            foreign or newer file, or no file that can be opened), FileNotFoundError.
        """
        archive.check_tokens(tokens)
        if fingerprint is not None:
            archive.check_fingerprint(fingerprint)
        (start, stop), records = archive.read_archive(path, tokens, fingerprint)
        parts = [
            Part(
                CacheSpec(record.kind, Visibility(*record.visibility), record.dtype),
                archive.rows_of(record),
            )
            for record in records
        ]
        return cls(start, stop, parts)


def _unpickled(
    start: int, stop: int, parts: Sequence[tuple[CacheSpec, Int32s, LayerRows]]
) -> Snapshot:
    return Snapshot(
        start, stop, [Part(spec, TokenRows(positions, layers)) for spec, positions, layers in parts]
    )


def check_same_specs(snapshots: Sequence[Snapshot], wanted: list[CacheSpec]) -> None:
    """Raise SnapshotMismatchError unless all snapshots have the specs `wanted`."""
    for snapshot in snapshots:
        if snapshot.specs != wanted:
            given = [tuple(spec) for spec in snapshot.specs]
            raise SnapshotMismatchError(
                "a snapshot goes back to caches of the same kinds, windows and dtype; "
                f"got {given} for {[tuple(spec) for spec in wanted]}."
            )
