"""The slow rules of pages: whether a pass fits, what may be removed, what a block table says."""

from __future__ import annotations

import itertools

import numpy as np

from kvcache import NotSupportedError

from .. import peek


def is_full(table, left, positions, sequences):
    """Whether a pass finds too few pages. left: positions that each sequence still holds then."""
    page = table.page
    rows = [table.cells_of(sequence).tolist() for sequence in range(table.max_sequences)]
    kept = [
        [cell for cell in row if int(table.positions[cell]) in left[sequence]]
        for sequence, row in enumerate(rows)
    ]
    taken = set().union(*rows)
    needed, ends = 0, set()
    for sequence in sorted(set(sequences)):
        tokens = list(sequences).count(sequence)
        slots = 0
        if kept[sequence] and kept[sequence][-1] % page < page - 1:
            end = kept[sequence][-1]
            slots = end % page + 1
            behind = range(end + 1, (end // page + 1) * page)
            if not taken.intersection(behind) and end not in ends:
                needed -= 1  # that page is its own already
            ends.add(end)
        needed += -(-(slots + tokens) // page)
    used = {cell // page for row in kept for cell in row}
    return needed > table.cells // page - len(used)


def refuses_removal(table, sequence, begin, end):
    """Whether positions ``[begin, end)``, with others behind, are not whole pages."""
    row = table.cells_of(sequence).tolist()
    held = table.positions[row].tolist()
    start, stop = (sum(position < limit for position in held) for limit in (begin, end))
    slots = [(row[0] + token) % table.page for token in (start, stop)]
    return start < stop and (slots[1] > 0 or (start > 0 and slots[0] > 0))


def check_block_table(cache, positions, sequences):
    """The block table of a pass leads to the cells of its sequences, or is refused with reason."""
    table, page = peek.table(cache), cache.page
    ids = list(dict.fromkeys(sequences))
    try:
        found = cache.block_table(host=True)
    except NotSupportedError:
        assert not is_sorted(positions, sequences, table) or not all(
            is_seen_alike(
                cache,
                sequence,
                min(p for p, s in zip(positions, sequences, strict=True) if s == sequence),
            )
            for sequence in ids
        )
        return
    assert is_sorted(positions, sequences, table)
    assert found.sequences.tolist() == ids
    assert all(array.dtype == np.int32 for array in found)
    for number, sequence in enumerate(ids):
        row = table.cells_of(sequence)
        length, start = int(found.lengths[number]), int(found.first_positions[number])
        begin = length - row.size
        assert 0 <= begin < page
        pages = found.block_tables[number].tolist()
        cells = [pages[slot // page] * page + slot % page for slot in range(length)]
        assert cells[begin:] == row.tolist()
        assert not any(pages[-(-length // page) :])
        assert start + begin == table.positions[row[0]]
        first, last = found.query_starts[number : number + 2]
        assert found.slot_mapping[first:last].tolist() == cells[length - (last - first) :]
        assert list(sequences[first:last]) == [sequence] * (last - first)
    width = found.block_tables.shape[1]
    assert width & (width - 1) == 0
    assert width // 2 < -(-int(found.lengths.max()) // page) <= width


def is_sorted(positions, sequences, table):
    """Whether the tokens of a batch are the last of each sequence, adjacent and in order."""
    groups = [
        (key, [position for position, _ in group])
        for key, group in itertools.groupby(
            zip(positions, sequences, strict=True), key=lambda pair: pair[1]
        )
    ]
    return len({key for key, _ in groups}) == len(groups) and all(
        table.positions[table.cells_of(key)].tolist()[-len(group) :] == group
        for key, group in groups
    )


def is_seen_alike(cache, sequence, first):
    """Whether a kernel that counts slots shows the tokens of a pass what the cache shows them.

    first: position of the first of them.
    """
    table = peek.table(cache)
    row = table.cells_of(sequence)
    held, begin = table.positions[row].tolist(), int(row[0]) % cache.page
    if cache.window is None and cache.chunk is None:
        return begin == 0
    low = 0 if cache.window is None else first - cache.window + 1
    low = low if cache.chunk is None else max(low, first // cache.chunk * cache.chunk)
    return held == list(range(held[0], held[-1] + 1)) and (begin == 0 or low >= held[0])
