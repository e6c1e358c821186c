"""Pages and states of stored prefixes: cut out of snapshots for a store, and put together again.

A *page* has a fixed number of positions, and the rows there of all caches that drop none. A *state*
has everything else that resuming at its position takes: the rows of windows and recurrent layers
needed there, and of the other caches the rows behind the last full page. So a prefix that ends
anywhere is full pages and one state, and one that ends at a page needs no state if no cache drops
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from kvcache._types import Bools, Int32s
from kvcache.errors import PageError
from kvcache.snapshots.archive import Record
from kvcache.snapshots.rows import LayerRows, TokenRows
from kvcache.snapshots.snapshot import CacheSpec, Part, Snapshot
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.arrays import ArrayForm, array_forms, concat_layers
from kvcache.stores.pages import Page


def page_of(snapshots: Sequence[Snapshot], start: int, stop: int) -> Page | None:
    """Return the page of positions ``[start, stop)``, with host copies of its rows.

    snapshots: of one sequence, in order. None if a cache that drops no rows lacks some there.
    """
    inside = [snapshot for snapshot in snapshots if snapshot.start < stop and start < snapshot.stop]
    records = [_record(column, _whole_rows(column[0].spec, start, stop)) for column in _by(inside)]
    missing = any(_lacks_rows(record, stop - start) for record in records)
    return None if missing or not records else Page(start, stop, tuple(records))


def state_of(snapshots: Sequence[Snapshot], position: int, start: int) -> Page | None:
    """Return the state to resume at `position`, with host copies of its rows.

    snapshots: as for :func:`page_of`; they can resume there. start: end of the last full page.
    """
    records = []
    for column in _by(snapshots):
        spec = column[0].spec
        whole = spec.visibility.resumable_anywhere
        wanted = _whole_rows(spec, start, position) if whole else _needed_rows(spec, position)
        records.append(_record(column, wanted))
        if whole and _lacks_rows(records[-1], position - start):
            return None
    firsts = [int(record.positions[0]) for record in records if record.positions.size]
    return Page(min([start, *firsts]), position, tuple(records))


def check_page(page: Page, start: int, stop: int, *, state: bool) -> Page:
    """Return a decoded `page` if it is that of ``[start, stop)``.

    state: whether it is the state at `stop`, whose rows of windows may be of earlier positions.

    Raises: PageError for other positions, and where a cache that drops no rows lacks some.
    """
    if page.stop != stop or (page.start > start if state else page.start != start):
        raise PageError(
            f"a page of [{start}, {stop}) was asked for; got [{page.start}, {page.stop})"
        )
    for record in page.parts:
        early = record.positions.size > 0 and record.positions[0] < start
        if _lacks_rows(record, stop - start) or (early and _is_whole(record)):
            raise PageError(f"rows of [{start}, {stop}) were asked for; got {record.positions}")
    return page


def specs_of(parts: Iterable[Record]) -> list[CacheSpec]:
    """Return the specs of the caches whose rows a page has."""
    return [CacheSpec(part.kind, Visibility(*part.visibility), part.dtype) for part in parts]


def check_specs(specs: Sequence[CacheSpec], own: Sequence[CacheSpec]) -> None:
    """Raise PageError for rows of other caches. Those without a dtype yet take any."""
    wanted = [
        spec._replace(dtype=spec.dtype or got.dtype) for spec, got in zip(own, specs, strict=False)
    ]
    if wanted != specs or len(own) != len(specs):
        raise PageError(f"pages are of {wanted}; got {specs}")


Forms: TypeAlias = list[dict[int, tuple[ArrayForm, ...]]]
"""Of each cache, the forms of the arrays of every layer; none where a page has no rows of it."""


def forms_of(parts: Iterable[Record]) -> Forms:
    """Return what all pages of one model have in common, as far as `parts` tell."""
    return [{layer: array_forms(arrays) for layer, arrays in part.layers.items()} for part in parts]


def check_forms(forms: Forms, wanted: Forms) -> None:
    """Raise PageError where both tell the forms of a cache, and they differ."""
    for own, other in zip(forms, wanted, strict=False):
        if own and other and own != other:
            raise PageError("arrays of a page have other sizes than those of the caches here")


class FetchedPrefix:
    """Rows of positions ``[start, stop)`` that came from a store, in host memory.

    pages: contiguous from `start` on, as :func:`page_of` cuts them; behind them, or alone, one of
        :func:`state_of`. The rows of windows may be of earlier positions.

    Raises: PageError unless all are of the same caches, and their rows fit together.
    """

    def __init__(self, start: int, pages: Sequence[Page]) -> None:
        self.start, self.stop = start, pages[-1].stop
        try:
            self._parts = [_part(column) for column in _columns_of(pages)]
        except ValueError as error:
            raise PageError(f"pages of one prefix do not fit together: {error}") from error

    def capture(self, start: int, stop: int) -> Snapshot:
        """Return a snapshot of ``[start, stop)``, with the rows of it that were fetched.

        None of caches that drop no rows where the range begins before what was fetched: a span
        with some of its rows only would count as complete.
        """
        parts = []
        for part in self._parts:
            positions = part.rows.positions
            partial = start < self.start and part.spec.visibility.resumable_anywhere
            first, last = np.searchsorted(positions, [start, stop]).tolist()
            rows = part.rows.take(slice(first, first if partial else last))
            parts.append(Part(part.spec, rows))
        return Snapshot(start, stop, parts)


def _by(snapshots: Iterable[Snapshot]) -> list[tuple[Part, ...]]:
    """Return the parts of `snapshots`, cache by cache."""
    return list(zip(*(snapshot.parts for snapshot in snapshots), strict=True))


def _whole_rows(spec: CacheSpec, start: int, stop: int) -> Callable[[Int32s], Bools]:
    whole = spec.visibility.resumable_anywhere
    return lambda positions: (positions >= start) & (positions < stop) & whole


def _needed_rows(spec: CacheSpec, position: int) -> Callable[[Int32s], Bools]:
    return lambda positions: spec.visibility.needed(positions, position)


def _record(column: Sequence[Part], wanted: Callable[[Int32s], Bools]) -> Record:
    """Return copies of the rows of one cache at the positions `wanted`."""
    positions, contents = [np.empty(0, np.int32)], []
    for part in column:
        index = np.flatnonzero(wanted(part.rows.positions))
        if index.size:
            positions.append(part.rows.positions[index])
            contents.append(part.rows.read(index))
    spec = column[0].spec
    kept = np.concatenate(positions)
    return Record(spec.kind, spec.visibility, spec.dtype, kept, _joined(contents))


def _lacks_rows(record: Record, wanted: int) -> bool:
    """Return whether a cache that drops no rows has another number of them than `wanted`.

    Encoder output (a window of 0) has any number.
    """
    return record.visibility[0] is None and _is_whole(record) and record.positions.size != wanted


def _is_whole(record: Record) -> bool:
    """Return whether a cache drops no rows."""
    return Visibility(*record.visibility).resumable_anywhere


def _columns_of(values: Sequence[Page]) -> Iterator[tuple[Record, ...]]:
    """Yield the records of each cache. Raises: PageError unless all are of the same caches."""
    specs = {tuple((part.kind, part.visibility, part.dtype) for part in v.parts) for v in values}
    if len(specs) > 1:
        raise PageError(
            f"pages of one prefix are of the same caches; got {sorted(map(str, specs))}"
        )
    yield from zip(*(value.parts for value in values), strict=True)


def _part(column: Sequence[Record]) -> Part:
    held = [record for record in column if record.positions.size]
    positions = np.concatenate([np.empty(0, np.int32), *(record.positions for record in held)])
    kind, visibility, dtype = column[0][:3]
    spec = CacheSpec(kind, Visibility(*visibility), dtype)
    return Part(spec, TokenRows(positions, _joined([record.layers for record in held])))


def _joined(contents: Sequence[LayerRows]) -> LayerRows:
    """Return rows that follow each other as one. Raises: ValueError for layers of other forms."""
    if len(contents) < 2:
        return contents[0] if contents else {}
    if any(content.keys() != contents[0].keys() for content in contents):
        raise ValueError("not all have the same layers")
    return {layer: concat_layers([own[layer] for own in contents]) for layer in contents[0]}
