"""Replays a recorded trace of the original on our caches, beside a mirror of the original's state.

The mirror is built from the recorded changes of cells, so that it knows at every op who held what
and with which keys and values. Where we differ on purpose, the replay says so by name, brings our
cache to where the original was, and goes on.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from kvcache import Batch, CacheConfig, CausalCache, KVCacheError, WrapperCache
from kvcache.pool.changes import Eviction

from .. import peek

DATA = Path(__file__).parents[1] / "data"
NO_END = 2147483647
REFUSAL = 25
"""Characters of a message that tell it apart."""
LAYOUT = {"key_layout": "thd", "value_layout": "thd"}  # the recorded order


@cache
def traces(kind):
    """The traces of one kind."""
    with gzip.open(DATA / f"{kind}.json.gz", "rt") as file:
        return json.load(file)


def name_of(trace):
    """What a trace is called: its name if it has one, or its seed."""
    return trace.get("name") or trace["seed"]


def consecutive(first, shape):
    """What a recorded put stored: consecutive numbers, ``[tokens, kv_heads, head_dim]``."""
    return np.arange(first, first + np.prod(shape), dtype=np.float32).reshape(shape[::-1])


def recorded(numbers, shape):
    """What a recorded get returned."""
    return np.array(numbers, np.float32).reshape(shape[::-1])


def bits(row):
    """One token's key or value as something to sort and compare."""
    return tuple(row.ravel().tolist())


def make_cache(settings, backend, shift):
    """One of our caches for the constructor arguments of one of the original's."""
    limits = {}
    if settings.get("window"):
        limits["window"] = settings["window"] + 1  # theirs does not count the token itself
    if settings.get("memory"):
        limits["memory"] = settings["memory"] + 1
    if settings.get("chunk"):
        limits["chunk"] = settings["chunk"]

    def add(layer, keys, offsets):
        host = backend.to_host(keys) + backend.to_host(offsets)[:, None, None]
        return backend.from_host(host.astype(np.float32))

    return CausalCache(**limits, shift=add if shift else None)


@dataclass
class Mirror:
    """The original's cells: position, sequences and content of each, by its index."""

    cells: dict[int, tuple[int, frozenset]] = field(default_factory=dict)
    rows: dict[tuple[int, int], tuple] = field(default_factory=dict)
    """Key and value by (layer, cell)."""

    def apply(self, changes, shifted=False):
        for cell, position, sequences in changes:
            if shifted and cell in self.cells and sequences:
                offset = position - self.cells[cell][0]
                for (layer, where), (keys, values) in list(self.rows.items()):
                    if where == cell:
                        self.rows[layer, where] = keys + offset, values
            self.cells.pop(cell, None)
            if sequences:
                self.cells[cell] = position, frozenset(sequences)

    def held(self):
        """Every cell's position and sequences."""
        return Counter(self.cells.values())

    def positions(self, sequence):
        return sorted(p for p, owners in self.cells.values() if sequence in owners)


def table_cells(table, sequences):
    """The same of one of our tables."""
    owners, positions = {}, {}
    for sequence in range(sequences):
        for cell in table.cells_of(sequence).tolist():
            owners.setdefault(cell, set()).add(sequence)
            positions[cell] = int(table.positions[cell])
    return Counter((positions[cell], frozenset(held)) for cell, held in owners.items())


class Replay:
    """One trace on one backend. differences: what differed on purpose, as (what, op index)."""

    def __init__(self, trace, backend):
        self.trace, self.backend = trace, backend
        self.config = trace["config"]
        self.differences = []
        self.gets = 0
        self.parts = [
            make_cache(settings, backend, self.config["shift"])
            for settings in self.config["caches"]
        ]
        self.cache = self.parts[0] if len(self.parts) == 1 else WrapperCache(*self.parts)
        self.cache.set_config(CacheConfig(padding=max(1, self.config["padding"]), **LAYOUT))
        self.mirrors = [Mirror() for _ in self.parts]
        self.overwritten = set()
        """(layer, cell) that the original lost in a reserve pass."""

    def run(self):
        """Replay everything, or up to a difference after which there is nothing to compare."""
        if not self._init():
            return self
        for index, op in enumerate(self.trace["ops"]):
            self.index = index
            if getattr(self, "_" + op["op"])(op) == "stop":
                return self
            self._compare_states()
        for mirror, cells in zip(self.mirrors, self.trace["final_cells"], strict=True):
            assert mirror.cells == {c: (p, frozenset(s)) for c, p, s in cells}
        return self

    def differ(self, what):
        self.differences.append((what, self.index))

    def _init(self):
        sizes = {name: self.config[name] for name in ("max_sequences", "capacity", "max_batch")}
        init = self.trace["init"]
        self.index = -1
        error = self._try(lambda: self.cache.init(self.backend, **sizes))
        if error:
            assert "memory must be at least the window" in str(error)
            if not init["err"]:
                self.differ("memory below window")
            return False
        assert not init["err"]
        assert [peek.table(part).cells for part in self.parts] == init["num_cells"]
        for part, window, memory in zip(
            self.parts, init["eff_window"], init["eff_memory"], strict=True
        ):
            assert part.window == (None if window == NO_END else window + 1)
            assert peek.tokens_retained(part) == (None if memory == NO_END else memory + 1)
        return True

    def _compare_states(self):
        for part, mirror in zip(self.parts, self.mirrors, strict=True):
            ours = table_cells(peek.table(part), self.config["max_sequences"])
            assert ours == mirror.held(), (self.index, ours - mirror.held())

    @staticmethod
    def _try(call, *arguments):
        try:
            call(*arguments)
        except (KVCacheError, ValueError) as error:
            return error
        return None

    # The ops.

    def _start_forward(self, op):
        error = self._try(
            lambda: self.cache.start_forward(Batch(op["pos"], op["seqs"]), reserve=op["reserve"])
        )
        if isinstance(error, ValueError):
            self.differ(f"refused: {str(error)[:REFUSAL]}")
            return "stop"
        assert bool(error) == bool(op["err"]), (self.index, error, op["err"])
        for mirror, changes in zip(self.mirrors, op["cells"], strict=True):
            mirror.apply(changes)
        if error:
            assert type(error).__name__ == "CacheFullError"
            if any(op["cells"]):
                self.differ("full: the original evicts first")
                self._evict_as_the_original_did()
        else:
            self.reserved = op["reserve"]
            self.locs, self.ranges = op["locs"], op["range"]
        return None

    def _evict_as_the_original_did(self):
        for part, mirror in zip(self.parts, self.mirrors, strict=True):
            table = peek.table(part)
            for sequence in range(self.config["max_sequences"]):
                ours = table.positions[table.cells_of(sequence)].tolist()
                theirs = mirror.positions(sequence)
                gone = len(ours) - len(theirs)
                assert theirs == ours[gone:]  # only the oldest
                one = np.array([sequence], np.int32)
                eviction = Eviction(one[: bool(gone)], np.array([gone])[: bool(gone)])
                table.evict(eviction, table.to_drop(eviction))

    def _layer_of(self, op):
        which = op["layer"] % len(self.parts)
        if len(self.parts) > 1:
            self.cache.set_layer_type(which)
        self.cache.set_layer(op["layer"])
        return which

    def _put(self, op):
        which = self._layer_of(op)
        keys, values = (consecutive(op[f"{x}_first"], op[f"{x}_shape"]) for x in "kv")
        error = self._try(
            self.cache.put, self.backend.from_host(keys), self.backend.from_host(values)
        )
        if op["err"]:
            assert "hold the" in str(error)
            self.differ("named error instead of a panic")
            return "stop"
        assert error is None
        rows = self.mirrors[which].rows
        if not self.reserved:
            for token, cell in enumerate(self.locs[which]):
                rows[op["layer"], cell] = keys[token], values[token]
            return None
        overwritten = {(op["layer"], cell) for cell in range(len(keys))} & rows.keys()
        if overwritten:
            self.differ("reserve: the original overwrites the first cells")
            self.overwritten |= overwritten
        return None

    def _get(self, op):
        which = self._layer_of(op)
        if op.get("err"):
            assert "was never put" in str(self._try(self.cache.get))
            self.differ("named error instead of a panic")
            return "stop"
        keys, values, mask = (self.backend.to_host(part) for part in self.cache.get())
        assert mask.dtype == np.bool_
        assert keys.shape[0] == values.shape[0] == mask.shape[1]
        if self.reserved:
            assert not mask.any()
            return None
        first = self.ranges[which][0]
        self._compare_with_recorded(op, which, first)
        rows = self.mirrors[which].rows
        key_bits, value_bits = [*map(bits, keys)], [*map(bits, values)]
        for token, line in enumerate(op["mask"]):
            pairs = [
                rows[op["layer"], first + column]
                for column, character in enumerate(line)
                if character == "1"
            ]
            theirs = sorted((bits(k), bits(v)) for k, v in pairs)
            ours = sorted((key_bits[i], value_bits[i]) for i in np.flatnonzero(mask[token]))
            assert ours == theirs, (self.index, token)
        self.gets += 1
        return None

    def _compare_with_recorded(self, op, which, first):
        """The mirror is right about the content, wherever that was recorded."""
        if op.get("k") is None:
            return
        keys, values = (recorded(op[x], op[f"{x}_shape"]) for x in "kv")
        seen = {i for line in op["mask"] for i, character in enumerate(line) if character == "1"}
        lost = {cell for layer, cell in self.overwritten if layer == op["layer"]}
        for column in seen - {cell - first for cell in lost}:
            mirrored = self.mirrors[which].rows[op["layer"], first + column]
            np.testing.assert_array_equal(mirrored[0], keys[column])
            np.testing.assert_array_equal(mirrored[1], values[column])

    def _set_causal(self, op):
        self._layer_of(op)
        tokens, size = op["except"] or [], len(self.locs[0])
        if max(tokens, default=0) >= size:
            assert "set_causal takes indices" in str(self._try(self.cache.set_causal, tokens))
            self.differ("set_causal: the original ignores indices outside the batch")
        self.cache.set_causal([token for token in tokens if token < size])

    def _copy_prefix(self, op):
        empty = [not mirror.positions(op["src"]) for mirror in self.mirrors]
        error = self._try(self.cache.copy_prefix, op["src"], op["dst"], op["len"])
        for mirror, changes in zip(self.mirrors, op["cells"], strict=True):
            mirror.apply(changes)
        if any(empty):
            assert isinstance(error, ValueError)
            self.differ("copy_prefix of nothing")
            self.cache.remove(op["dst"], 0)
        elif op["src"] == op["dst"]:
            assert error is None
            self.differ("copy_prefix onto itself")
            return "stop"
        else:
            assert error is None
        return None

    def _remove(self, op):
        end = None if op["end"] == NO_END else op["end"]
        before = [mirror.held() for mirror in self.mirrors]
        behind = [
            any(p >= op["end"] for p in mirror.positions(op["seq"])) for mirror in self.mirrors
        ]
        error = self._try(self.cache.remove, op["seq"], op["begin"], end)
        if isinstance(error, ValueError):
            self.differ(f"refused: {str(error)[:REFUSAL]}")
            return "stop"
        for mirror, changes in zip(self.mirrors, op["cells"], strict=True):
            mirror.apply(changes, shifted=not op["err"] and end is not None)
        if not op["err"]:
            assert error is None
            return None
        if error is None:
            assert op["err"] == "model does not support operation"
            assert not any(behind)
            self.differ("remove with nothing behind needs no shift")
        else:
            assert type(error).__name__ == {
                "model does not support operation": "NotSupportedError",
                "shifting cells shared by multiple sequences not supported": "SharedCellsError",
            }.get(op["err"])
            if before != [mirror.held() for mirror in self.mirrors]:
                self.differ("remove: the original changes cells before it fails")
        return self._skip_to_whole_removal(op)

    def _skip_to_whole_removal(self, op):
        """The random traces empty a sequence after an error, which makes us equal again."""
        follower = self.trace["ops"][self.index + 1 : self.index + 2]
        wanted = {"op": "remove", "seq": op["seq"], "begin": 0, "end": NO_END, "err": ""}
        if not follower or not wanted.items() <= follower[0].items():
            return "stop"
        self.cache.remove(op["seq"], 0)
        for mirror in self.mirrors:
            mirror.apply(
                [(c, p, owners - {op["seq"]}) for c, (p, owners) in list(mirror.cells.items())]
            )
        return None

    def _can_resume(self, op):
        sequence, position = op["seq"], op["pos"]
        ours = self.cache.can_resume(sequence, position)
        told = all(
            self._contract(part, mirror.positions(sequence), position)
            for part, mirror in zip(self.parts, self.mirrors, strict=True)
        )
        assert ours == told, (self.index, op)
        if ours != op["result"]:
            self.differ(self._why_resume_differs(sequence, position, ours))

    @staticmethod
    def _contract(part, stored, position):
        visible = range(position)
        if part.window is not None:
            visible = range(max(0, position - part.window + 1), position)
        if part.chunk is not None:
            visible = [p for p in visible if p // part.chunk == position // part.chunk]
        return set(visible) <= set(stored)

    def _why_resume_differs(self, sequence, position, ours):
        if ours:
            assert position == 0
            return "can_resume at position 0"
        assert any(position > max([-1, *m.positions(sequence)]) + 1 for m in self.mirrors)
        return "can_resume beyond the end"


def difference_table(replays):
    """``{what differs: {trace: [op indices]}}``."""
    table = {}
    for name, replay in replays.items():
        for what, index in replay.differences:
            table.setdefault(what, {}).setdefault(name, []).append(index)
    return table
