"""Recorded traces of the Go caches that these ones stand in for, on every backend.

At every op our cells hold what the original's held, and every token of every get attends to the
same keys and values. `DIFFERENCES` names every op of every trace where that is not so, and why;
nothing else differs.
"""

from collections import Counter

import numpy as np
import pytest

from kvcache import Batch, CacheConfig, EncoderCache, KVCacheError

from .. import peek
from .replay import LAYOUT, NO_END, Replay, consecutive, difference_table, name_of, recorded, traces

KINDS = ("causal", "swa", "swamem", "chunked", "wrapper")
GETS = {"causal": 1588, "swa": 1422, "swamem": 1564, "chunked": 1509, "wrapper": 2008}
STRIDE = {"numpy": 1, "jax": 15}  # of the traces; jax compiles for every shape
OTHERS = 4

# Each says what the original does, or why ours does otherwise.
FULL = "full: the original evicts first"
FAILED_REMOVE = "remove: the original changes cells before it fails"
BEYOND = "can_resume beyond the end"  # it says yes for an unlimited cache, whatever the position
AT_ZERO = "can_resume at position 0"  # it says no if it does not know the sequence, or cut it
COPY_OF_NOTHING = "copy_prefix of nothing"  # it drops the destination
COPY_ONTO_ITSELF = "copy_prefix onto itself"  # it drops the sequence
NO_SHIFT_NEEDED = "remove with nothing behind needs no shift"
MEMORY = "memory below window"  # it raises the memory, if there are several sequences
RESERVE = "reserve: the original overwrites the first cells"
OUTSIDE = "set_causal: the original ignores indices outside the batch"
PANIC = "named error instead of a panic"

DIFFERENCES = {
    "causal": {
        FAILED_REMOVE: {
            1010: [30, 41, 93, 110, 128],
            1012: [95],
            1013: [12],
            1015: [68, 70],
            1020: [100],
            1028: [29, 39],
            1039: [23, 47, 60],
            1040: [69],
            1041: [131],
            1046: [56],
            1049: [146, 184],
        },
        BEYOND: {
            1000: [8, 26],
            1001: [111],
            1003: [140],
            1004: [73],
            1008: [3, 6, 61],
            1010: [89],
            1011: [65],
            1012: [24, 51],
            1013: [54],
            1015: [23],
            1018: [48],
            1019: [11, 26, 71],
            1020: [6],
            1021: [28],
            1022: [18],
            1023: [6],
            1024: [91],
            1025: [24, 81],
            1026: [3],
            1028: [25, 34],
            1029: [183],
            1030: [3, 40],
            1032: [40],
            1033: [9, 103],
            1034: [58],
            1035: [9],
            1036: [26],
            1037: [12],
            1038: [107],
            1040: [35, 71],
            1041: [133, 134],
            1042: [25],
            1044: [72],
            1047: [15, 47],
        },
        COPY_OF_NOTHING: {
            1001: [0],
            1008: [1],
            1017: [0],
            1021: [2],
            1029: [9],
            1031: [1],
            1037: [3],
            1046: [0],
        },
        NO_SHIFT_NEEDED: {1010: [46, 70, 120], 1013: [58], 1015: [83], 1019: [61, 106]},
    },
    "swa": {
        FULL: {
            2001: [28],
            2007: [53],
            2011: [84, 94],
            2014: [48],
            2016: [37],
            2017: [90, 104],
            2021: [64],
            2024: [122],
            2026: [91],
            2029: [79, 95],
            2031: [103],
            2036: [26],
            2040: [47],
            2043: [101],
            2046: [44, 75],
            2047: [90, 95],
            2048: [66],
        },
        FAILED_REMOVE: {
            2008: [52],
            2013: [22, 85],
            2024: [40, 98],
            2034: [40, 71, 80],
            2039: [26],
            2042: [85, 120],
            2048: [34, 40, 67],
        },
        BEYOND: {2008: [0, 29], 2015: [18]},
        AT_ZERO: {
            2001: [98],
            2005: [101],
            2007: [95],
            2012: [65],
            2021: [85, 95],
            2022: [0],
            2024: [78],
            2025: [36],
            2027: [112],
            2032: [24],
            2044: [23],
        },
        COPY_OF_NOTHING: {2002: [1], 2036: [1], 2041: [0], 2046: [50], 2048: [44], 2049: [15]},
        NO_SHIFT_NEEDED: {
            2013: [30, 44, 50],
            2016: [4, 17, 127],
            2024: [16],
            2025: [12],
            2042: [6, 67],
        },
    },
    "swamem": {
        FULL: {
            3004: [61, 115],
            3008: [243],
            3012: [105],
            3014: [120],
            3018: [34],
            3023: [144],
            3031: [44],
            3033: [73],
            3036: [43],
            3040: [18],
        },
        FAILED_REMOVE: {
            3004: [33],
            3019: [16, 44],
            3024: [71],
            3034: [41],
            3037: [64],
            3043: [79, 130],
            3048: [80],
        },
        BEYOND: {3013: [34, 181], 3021: [3, 82], 3047: [65, 75, 100]},
        AT_ZERO: {
            3011: [68],
            3012: [85],
            3020: [1],
            3023: [138],
            3025: [60],
            3028: [108],
            3032: [25],
            3043: [149],
            3046: [90],
        },
        COPY_OF_NOTHING: {3014: [3], 3031: [4], 3037: [1], 3046: [22, 72]},
        MEMORY: {3017: [-1], 3039: [-1], 3049: [-1]},
    },
    "chunked": {
        FAILED_REMOVE: {
            4000: [105, 111],
            4005: [112],
            4006: [104],
            4013: [141, 146],
            4016: [77, 144],
            4017: [27],
            4020: [65],
            4028: [60, 146],
            4034: [104],
            4039: [103],
            4042: [32],
            4046: [85],
        },
        BEYOND: {
            4001: [1],
            4004: [0, 41],
            4008: [57],
            4010: [6, 16],
            4013: [148],
            4015: [45],
            4017: [6],
            4022: [6],
            4024: [70],
            4025: [91],
            4028: [9, 85],
            4029: [5, 22],
            4030: [106],
            4032: [0],
            4035: [79],
            4036: [18],
            4037: [46],
            4038: [7, 12, 21, 67, 91],
            4039: [3, 59, 127, 135],
            4040: [0, 53],
            4043: [10],
            4045: [21],
            4047: [1],
        },
        COPY_OF_NOTHING: {4003: [0], 4027: [0], 4028: [3], 4036: [122], 4040: [196]},
        NO_SHIFT_NEEDED: {4013: [9, 109], 4016: [68, 80], 4037: [8]},
    },
    "wrapper": {
        FULL: {
            5000: [139, 157],
            5001: [87, 112],
            5005: [121, 173],
            5006: [114],
            5008: [104],
            5009: [142],
            5010: [172],
            5011: [48],
            5012: [55, 61, 63, 69, 70],
            5014: [140],
            5017: [77, 245],
            5023: [132, 133, 150, 190, 191, 192],
            5031: [189],
            5032: [91],
            5036: [8, 62, 69],
        },
        FAILED_REMOVE: {5000: [119], 5004: [69], 5022: [38, 40, 82], 5025: [107, 130]},
        BEYOND: {5030: [55, 152]},
        AT_ZERO: {5016: [141], 5024: [6], 5031: [152]},
        COPY_OF_NOTHING: {5008: [0, 2], 5010: [5, 8], 5015: [1], 5019: [13], 5023: [0], 5024: [0]},
        NO_SHIFT_NEEDED: {5016: [106, 138], 5022: [124, 165]},
    },
}
"""``{kind: {what differs: {seed: [op indices]}}}``."""

EDGE_DIFFERENCES = {
    OUTSIDE: {"set_causal_scope": [2, 4]},
    FULL: {"full_error_keeps_old": [6], "wrapper_unwind": [5]},
    FAILED_REMOVE: {
        "remove_middle_shared": [7],
        "remove_middle_shared_unshared_first": [11],
        "remove_middle_no_shift": [3],
        "wrapper_partial_remove_error": [16],
    },
    BEYOND: {"swa_window_zero": [7], "swa_window_ge_capacity": [5]},
    AT_ZERO: {"copy_prefix_missing_src": [1], "remove_unknown_seq": [6]},
    COPY_OF_NOTHING: {"copy_prefix_missing_src": [0], "copy_prefix_missing_src_over_dst": [3]},
    COPY_ONTO_ITSELF: {"copy_prefix_self": [3]},
    NO_SHIFT_NEEDED: {"remove_middle_whole_no_shift": [7]},
    MEMORY: {"swamem_memory_below_window_two_seq": [-1], "swamem_memory_below_window_large": [-1]},
    RESERVE: {"reserve_then_put": [4]},
    PANIC: {"put_wrong_batch": [1], "get_before_put": [1], "get_other_layer_before_put": [3]},
}
"""``{what differs: {name: [op indices]}}``; index -1 is init."""

REFUSED = {
    "empty_batch": (0, "a batch has one position "),
    "empty_batch_filled": (3, "a batch has one position "),
    "empty_batch_full": (3, "a batch has one position "),
    "remove_inverted_range": (3, "a range must satisfy 0 <="),
    "duplicate_positions": (3, "sequence 0 holds position"),
    "foreign_seq_ids": (0, "sequence ids must lie in "),
    "foreign_seq_ids_swa": (0, "sequence ids must lie in "),
}
"""What the original takes and we do not: ValueError at this op, which says so."""


def replay_all(kind, backend, stride=1):
    """Every `stride`-th trace of a kind, replayed, by name."""
    return {name_of(trace): Replay(trace, backend).run() for trace in traces(kind)[::stride]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_attends_to_what_it_did_in_the_original(backend, kind):
    stride = STRIDE.get(backend.name, OTHERS)
    replays = replay_all(kind, backend, stride)
    gets = sum(replay.gets for replay in replays.values())
    assert gets == GETS[kind] if stride == 1 else gets > GETS[kind] / stride / 2
    expected = {
        what: {name: ops for name, ops in found.items() if name in replays}
        for what, found in DIFFERENCES[kind].items()
    }
    assert difference_table(replays) == {what: found for what, found in expected.items() if found}


def test_every_named_edge_case_is_decided(backend):
    replays = replay_all("edge", backend, 3 if backend.name == "jax" else 1)
    expected = {
        name: [(what, op) for what, found in EDGE_DIFFERENCES.items() for op in found.get(name, ())]
        for name in replays
    }
    for name, (op, message) in REFUSED.items():
        if name in replays:
            expected[name].append((f"refused: {message}", op))
    found = {name: replay.differences for name, replay in replays.items()}
    assert {name: sorted(table) for name, table in found.items()} == {
        name: sorted(table) for name, table in expected.items()
    }


# The encoder: one sequence in the original, any number in ours.

E_NO_PASS = "put and get belong to a pass"  # the original needs none
E_RESUME = "resuming before the latest output"  # it says yes, without the earlier output
E_STALE = "get of nothing"  # it returns nothing, or what was removed before the pass
E_GONE = "put for a removed sequence"  # it stores it; ours waits for the next pass
E_UNFINISHED = "put of some layers"  # it replaces layer by layer; ours all of them, or none
E_RESERVE = "reserve overwrites"  # it writes to the buffers
E_POSITION = "position of output without an image"  # it takes that of the last image; ours is 0
E_SHIFT = "position after a removal in front"  # it leaves it
E_COPY = "copy_prefix"  # it panics
E_CACHED = "encoder_cached without a pass"  # ours asks about the sequences of the current one

ENCODER_DIFFERENCES = {
    E_NO_PASS: {
        7004: 1,
        7005: 1,
        7008: 1,
        7010: 1,
        7013: 1,
        7015: 1,
        7021: 1,
        7023: 1,
        7024: 1,
        7026: 1,
        7029: 1,
        7030: 1,
        7031: 1,
        7032: 1,
        7034: 1,
    },
    E_STALE: {
        7000: 2,
        7002: 2,
        7004: 2,
        7005: 3,
        7006: 4,
        7010: 2,
        7013: 5,
        7014: 2,
        7015: 5,
        7017: 4,
        7018: 3,
        7021: 1,
        7023: 7,
        7024: 1,
        7025: 3,
        7026: 2,
        7028: 2,
        7029: 2,
        7030: 1,
        7032: 4,
        7033: 1,
        7034: 1,
        7035: 6,
    },
    E_RESERVE: {7026: 3, 7027: 1, 7031: 1},
    E_POSITION: {
        7005: 1,
        7006: 2,
        7014: 3,
        7015: 3,
        7016: 2,
        7017: 4,
        7018: 3,
        7020: 2,
        7021: 1,
        7023: 1,
        7024: 2,
        7025: 1,
        7026: 1,
        7027: 1,
        7028: 2,
        7029: 1,
        7030: 2,
        7033: 1,
        7035: 2,
    },
    E_RESUME: {7010: 1, 7011: 1, 7025: 1},
    E_SHIFT: {7005: 1, 7010: 1, 7014: 1, 7015: 1, 7033: 1, 7035: 1},
    E_COPY: {
        7000: 2,
        7004: 1,
        7006: 1,
        7008: 2,
        7010: 1,
        7013: 1,
        7015: 1,
        7016: 1,
        7017: 3,
        7018: 1,
        7021: 1,
        7023: 1,
        7024: 1,
        7025: 1,
        7026: 2,
        7027: 2,
        7029: 2,
        7031: 2,
        7032: 1,
        7034: 1,
        7035: 1,
    },
    E_GONE: {
        7000: 1,
        7002: 1,
        7005: 1,
        7009: 1,
        7010: 1,
        7015: 2,
        7020: 1,
        7023: 1,
        7030: 2,
        7031: 1,
        7032: 1,
        7033: 1,
    },
    E_UNFINISHED: {
        7000: 2,
        7005: 2,
        7008: 1,
        7009: 3,
        7010: 2,
        7013: 1,
        7014: 3,
        7015: 4,
        7016: 4,
        7017: 3,
        7020: 3,
        7021: 1,
        7023: 1,
        7024: 2,
        7025: 4,
        7026: 1,
        7028: 2,
        7029: 3,
        7032: 1,
        7035: 4,
    },
}
"""``{what differs: {seed: how often}}``."""


class EncoderReplay:
    """One encoder trace. After each difference ours is brought to where the original was."""

    def __init__(self, trace, backend):
        self.trace, self.backend = trace, backend
        self.found = Counter()
        self.lost = set()  # layers that the original overwrote in a reserve pass
        self.fresh = set()  # layers that ours holds
        self.readable = set()  # layers that the current pass reads: those held when it began
        self.reserved = False
        self.passing = set()  # layers put in the current pass, if it is a reserve pass
        self.cache = EncoderCache()
        self.cache.set_config(CacheConfig(**LAYOUT))
        self.cache.init(backend, max_sequences=2)  # 1 in the trace, but it copies to another

    def run(self):
        for op in self.trace["ops"]:
            if op["op"] in ("put", "get") and peek.encoder_batch(self.cache) is None:
                self._needs_a_pass(op)
            getattr(self, "_" + op["op"])(op)
            self._compare(op)
        return self.found

    def _needs_a_pass(self, op):
        self.found[E_NO_PASS] += 1
        self.cache.set_layer(op["layer"])
        with pytest.raises(KVCacheError, match="Call start_forward first"):
            self.cache.get()
        with pytest.raises(KVCacheError, match="Call start_forward first"):
            self.cache.put(None, None)
        self._begin(Batch([0], [0]), False)

    def _begin(self, batch, reserve):
        self.cache.start_forward(batch, reserve)
        self.batch = batch
        self.readable = set(self.fresh)

    def _compare(self, op):
        if peek.encoder_batch(self.cache) is None:
            assert not self.cache.encoder_cached
            self.found[E_CACHED] += op["encoder_cached"]
            return
        assert self.cache.encoder_cached == op["encoder_cached"]
        entry = peek.entries(self.cache).get(0)
        if entry is not None and entry.kept and entry.position != op["encoder_pos"]:
            self.found[E_SHIFT if op["op"] == "remove" else E_POSITION] += 1
            peek.set_output_position(self.cache, 0, op["encoder_pos"])

    def _start_forward(self, op):
        batch = Batch(op["pos"], op["seqs"], op["multimodal_index"])
        self._begin(batch, op["reserve"])
        self.reserved = op["reserve"]
        self.passing.clear()

    def _put(self, op):
        keys, values = (consecutive(op[f"{x}_first"], op[f"{x}_shape"]) for x in "kv")
        if not peek.arriving(self.cache):
            self.found[E_GONE] += 1
            self._begin(self.batch, self.reserved)
        self.cache.set_layer(op["layer"])
        self.cache.put(self.backend.from_host(keys), self.backend.from_host(values))
        if self.reserved:
            self.lost.add(op["layer"])
            self.passing.add(op["layer"])
            return
        self.lost.discard(op["layer"])
        self.fresh.add(op["layer"])
        self.readable.add(op["layer"])
        if not self.cache.pass_complete():
            self.found[E_UNFINISHED] += 1
            peek.store_unfinished(self.cache)

    def _get(self, op):
        self.cache.set_layer(op["layer"])
        if op["layer"] not in self.readable | self.passing:
            self.found[E_STALE] += 1
            with pytest.raises(KVCacheError, match="holds no encoder output"):
                self.cache.get()
            return
        keys, values, mask = self.cache.get()
        assert mask is None
        assert op["mask_is_nil"]
        same = [
            np.array_equal(self.backend.to_host(ours), recorded(op[x], op[f"{x}_shape"]))
            for x, ours in (("k", keys), ("v", values))
        ]
        lost = op["layer"] in self.lost - self.passing
        assert same == [not lost] * 2
        self.found[E_RESERVE] += lost

    def _remove(self, op):
        self.cache.remove(op["seq"], op["begin"], None if op["end"] == NO_END else op["end"])
        if not op["encoder_cached"]:
            self.fresh.clear()

    def _can_resume(self, op):
        assert op["result"] is True
        if not self.cache.can_resume(op["seq"], op["pos"]):
            self.found[E_RESUME] += 1

    def _copy_prefix(self, op):
        assert op["err"].startswith("panic: encoder cache does not support multiple")
        self.found[E_COPY] += 1
        self.cache.copy_prefix(op["src"], op["dst"], op["len"])


def test_the_encoder_replays(backend):
    usable = [trace for trace in traces("encoder") if trace["ops"]]
    stride = 6 if backend.name == "jax" else 1
    found = {t["seed"]: EncoderReplay(t, backend).run() for t in usable[::stride]}
    reasons = sorted(set().union(*found.values()))
    by_reason = {
        reason: {seed: counts[reason] for seed, counts in found.items() if counts[reason]}
        for reason in reasons
    }
    assert {reason: table for reason, table in by_reason.items() if table} == {
        reason: kept
        for reason, table in ENCODER_DIFFERENCES.items()
        if (kept := {seed: n for seed, n in table.items() if seed in found})
    }


def test_the_encoder_takes_what_the_original_refuses_at_init():
    """Several sequences, and padding: its masks are None, so it pads nothing."""
    refused = [trace for trace in traces("encoder") if not trace["ops"]]
    for trace in refused:
        assert trace["init"]["err"].startswith("panic: encoder cache")
        cache = EncoderCache()
        cache.set_config(CacheConfig(padding=max(1, trace["config"]["padding"]), **LAYOUT))
        cache.init("numpy", max_sequences=trace["config"]["max_sequences"])
        last = trace["config"]["max_sequences"] - 1
        cache.start_forward(Batch([0], [last], [0]))
        keys = consecutive(1, [2, 3, 4])
        cache.put(keys, keys)
        np.testing.assert_array_equal(cache.get()[0], keys)
    assert len(refused) == 6
