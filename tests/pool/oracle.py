"""A multi-sequence cache that is slow and obviously right, and what looks inside a real one.

For each sequence the oracle keeps ``{position: token}``. A token is a number that names one put;
two sequences share a cell where they hold the same token. Keys are ``[token, position]``, and the
shift adds its offsets to the position, so that what a key should be is known without bookkeeping.
"""

from __future__ import annotations

import itertools

import numpy as np

from .. import peek
from .attention_oracle import attention

LAYERS = 2
"""Layer 0 has keys and values, layer 1 only keys."""


class Oracle:
    """What one causal cache should hold."""

    def __init__(self, max_sequences, capacity, max_batch, padding=1, page=1, **limits):
        self.window = limits.get("window")
        self.chunk = limits.get("chunk")
        self.shifts = limits.get("shift") is not None
        self.held = [{} for _ in range(max_sequences)]
        self.recent = set()
        kept = None
        if self.window is not None:
            kept = limits.get("memory") or self.window
            if max_sequences > 1:
                kept = max(kept, self.window + 1)
            if kept > capacity:
                kept = None
        self.kept = kept
        cells = max_sequences * capacity if kept is None else max_sequences * (kept - 1) + max_batch
        self.page = page
        if page > 1:
            cells = page * pages_of_pool(max_sequences, capacity, max_batch, kept, page)
        self.size = next(n for n in itertools.count(cells) if n % padding == n % page == 0)

    def cells(self, held=None):
        """How many cells are in use."""
        return len(set().union(*(h.values() for h in self.held if held is None or held)))

    def next(self, sequence):
        return max(self.held[sequence], default=-1) + 1

    def refuses(self, positions, sequences):
        """What is wrong with a batch: ValueError, "full" or nothing."""
        pairs = list(zip(sequences, positions, strict=True))
        if any(not 0 <= s < len(self.held) or p < 0 for s, p in pairs):
            return "bad"
        if len(set(pairs)) < len(pairs) or any(p in self.held[s] for s, p in pairs):
            return "bad"
        left = self.trimmed(positions, sequences)
        used = len(set().union(*(h.values() for h in left)))
        return "full" if used + len(pairs) > self.size else None

    def trimmed(self, positions, sequences):
        """What is held when all that lies too far back is gone."""
        if self.kept is None:
            return self.held
        nexts = {s: self.next(s) for s in self.recent}
        for s in set(sequences):
            nexts[s] = min(p for p, t in zip(positions, sequences, strict=True) if t == s)
        return [
            {p: t for p, t in h.items() if s not in nexts or p >= nexts[s] - (self.kept - 1)}
            for s, h in enumerate(self.held)
        ]

    def store(self, positions, sequences, tokens):
        self.held = [dict(h) for h in self.trimmed(positions, sequences)]
        self.recent = set(sequences)
        for position, sequence, token in zip(positions, sequences, tokens, strict=True):
            self.held[sequence][position] = token

    def visible(self, sequence, position, ahead=False):
        """What a token attends to: ``(token, position)``, sorted."""
        return sorted(
            (token, p)
            for p, token in self.held[sequence].items()
            if (ahead or p <= position)
            and (self.window is None or p > position - self.window)
            and (self.chunk is None or p >= position // self.chunk * self.chunk)
        )

    def can_resume(self, sequence, position):
        return all(
            p in self.held[sequence]
            for p in range(position)
            if (self.window is None or p > position - self.window)
            and (self.chunk is None or p // self.chunk == position // self.chunk)
        )

    def copy(self, source, target, length):
        self.held[target] = {p: t for p, t in self.held[source].items() if p < length}
        if source != target:
            self.recent.add(target)

    def refuses_removal(self, sequence, begin, end):
        """Whether a removal fails, and as what."""
        if end is None or begin == end:
            return None
        moving = {t for p, t in self.held[sequence].items() if p >= end}
        others = set().union(*(h.values() for s, h in enumerate(self.held) if s != sequence))
        if moving & others:
            return "SharedCellsError"
        return "NotSupportedError" if moving and not self.shifts else None

    def remove(self, sequence, begin, end):
        self.held[sequence] = {
            p if p < begin else p - (end - begin): t
            for p, t in self.held[sequence].items()
            if p < begin or (end is not None and p >= end)
        }


def pages_of_pool(max_sequences, capacity, max_batch, kept, page):
    """Pages that hold every sequence and a pass at worst, wherever in a page a sequence begins."""
    if kept is None:
        return max_sequences * -(-capacity // page)

    def touched(tokens):
        begins = range(page if kept > 1 else 1)  # without any left, a sequence begins a page
        return max(len({(slot + i) // page for i in range(tokens)}) for slot in begins)

    alone = [touched(kept - 1 + tokens) for tokens in range(max_batch + 1)]
    most = alone  # by the number of tokens that a pass has for the sequences so far
    for _ in range(max_sequences - 1):
        most = [
            max(most[others] + alone[tokens - others] for others in range(tokens + 1))
            for tokens in range(max_batch + 1)
        ]
    return max(most)


def add_positions(backend):
    """The shift that goes with keys of ``[token, position]``."""

    def shift(layer, keys, offsets):
        moved = backend.to_host(keys).copy()
        moved[..., 1] += backend.to_host(offsets)
        return backend.from_host(moved)

    return shift


def put_tokens(backend, cache, tokens, positions, layer_type=None):
    """Put every layer of a pass."""
    keys, values = rows(tokens, positions)
    for layer in range(LAYERS):
        if layer_type is not None:
            cache.set_layer_type(layer_type)
        cache.set_layer(layer)
        cache.put(backend.from_host(keys), None if layer else backend.from_host(values))


def rows(tokens, positions):
    """Keys ``[2, tokens, 2]`` and values ``[1, tokens, 3]`` of some tokens."""
    keys = np.array([tokens, positions], np.float32).T
    values = np.repeat(np.array(tokens, np.float32)[:, None] + 0.5, 3, axis=1)
    return np.stack([keys, keys * np.array([-1, 1], np.float32)]), values[None]


def attended(backend, cache, layer):
    """``(token, position)`` of all that each token of the pass attends to, sorted."""
    cache.set_layer(layer)
    keys, values, mask = cache.get()
    keys, mask = backend.to_host(keys), backend.to_host(mask)
    if mask.dtype != np.bool_:
        visible = mask == 0
        sees = visible.any(-1)
        assert set(np.unique(mask[sees])) <= {0.0, -np.inf}
        assert np.isfinite(mask[~sees].astype(np.float32)).all()  # else softmax would be NaN
        mask = visible
    assert keys.shape == (2, mask.shape[1], 2)
    seen = [keys[:, line] for line in mask]
    if layer == 0:
        values = backend.to_host(values)
        assert values.shape == (1, mask.shape[1], 3)
        for line, mine in zip(mask, seen, strict=True):
            np.testing.assert_array_equal(values[0, line], mine[0, :, :1] + np.full(3, 0.5))
    else:
        assert values is None
    for mine in seen:
        np.testing.assert_array_equal(mine[1], mine[0] * [-1, 1])
    return [sorted((int(t), int(p)) for t, p in mine[0]) for mine in seen]


def check_attention(backend, cache, expected):
    """Attention of the layer of keys only is over ``(token, position)`` of each query's list."""
    q = np.linspace(-1, 1, 4 * len(expected) * 2, dtype=np.float32).reshape(4, -1, 2)
    cache.set_layer(1)
    out = backend.to_host(cache.attend(backend.from_host(q), scale=0.01))
    for i, visible in enumerate(expected):
        keys, _ = rows(*zip(*visible, strict=True))
        np.testing.assert_allclose(
            out[:, i], attention(q[:, i], keys, keys, 0.01), rtol=1e-4, atol=1e-3
        )


def check_table(table):
    """What is always true of a table of cells."""
    holders = np.zeros(table.cells, int)
    for sequence in range(len(table.first)):
        row = table.cells_of(sequence)
        holders[row] += 1
        if row.size:
            assert (np.diff(table.positions[row]) > 0).all()
            assert table.span(np.array([sequence])) == (row.min(), row.max() + 1)
    np.testing.assert_array_equal(table.allocator.refcounts, holders)
    check_free(table, holders)


def check_free(table, holders):
    """What has no holders is free, in whole pages, and can be handed out. holders: by cell."""
    free = np.flatnonzero(~holders.reshape(-1, table.page).any(1))
    assert table.free == free.size * table.page
    if table.page > 1:
        cells = (holders.reshape(-1, table.page) > 0).sum(1)
        np.testing.assert_array_equal(peek.units(table).refcounts, cells)
        for sequence in range(len(table.first)):
            check_pages(table.cells_of(sequence).tolist(), table.page)
    stacked = peek.free_stack(table)
    assert set(free.tolist()) <= set(stacked.tolist())
    assert len(set(stacked.tolist())) == stacked.size
    np.testing.assert_array_equal(np.flatnonzero(peek.stacked(table)), np.sort(stacked))


def check_pages(row, page):
    """Every cell of a sequence comes after the one before it, in the same page or a new one."""
    pages = [cell // page for cell in row]
    for before, cell in itertools.pairwise(row):
        assert cell % page == (before + 1) % page
        assert (cell // page == before // page) == (cell % page > 0)
    assert len(set(pages)) == sum(1 for _ in itertools.groupby(pages))


def check_held(cache, oracle):
    """A cache holds the positions that it should, and shares the cells that it should."""
    table = peek.table(cache)
    if oracle.page > 1:
        assert table.cells >= oracle.size
        assert table.cells % oracle.page == 0
    else:
        assert table.cells == oracle.size
        assert table.cells - table.free == oracle.cells()
    token_of = {}
    for sequence, held in enumerate(oracle.held):
        row = table.cells_of(sequence)
        assert table.positions[row].tolist() == sorted(held)
        for cell, position in zip(row.tolist(), sorted(held), strict=True):
            assert token_of.setdefault(cell, held[position]) == held[position]


def fingerprint(cache):
    """All that a causal cache is, to the byte; scratch space aside."""
    table, allocator = peek.table(cache), peek.table(cache).allocator
    to_host = peek.buffers(cache).backend.to_host
    state = {**vars(table), **vars(allocator)}
    if peek.units(table) is not allocator:
        state |= {f"pages.{name}": value for name, value in vars(peek.units(table)).items()}
    scalars = {n: v for n, v in state.items() if isinstance(v, int)}
    arrays = {
        n: v.tobytes()
        for n, v in state.items()
        if isinstance(v, np.ndarray)
        and n.removeprefix("pages.") not in ("_claims", "rows", "_stack")
    }
    live = [table.cells_of(s).tobytes() for s in range(len(table.first))]
    layers = {
        layer: tuple(to_host(buffer).tobytes() for buffer in buffers)
        for layer, buffers in peek.layers(cache).items()
    }
    stack, current = peek.free_stack(table).tobytes(), peek.forward_pass(cache)
    ahead = None if current is None else current.ahead
    return scalars, arrays, live, stack, layers, set(peek.maybe_expired(cache)), id(current), ahead
