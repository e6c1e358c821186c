"""Prompt caches for mlx-lm: what they are made of, going back, batches, files, refusals."""

import copy
import inspect

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models import cache as library  # noqa: E402

from kvcache import (  # noqa: E402
    KVCache,
    LayerCaches,
    NotSupportedError,
    RotatingKVCache,
    StateCache,
    TrimError,
)
from kvcache.adapters.mlx_lm import (  # noqa: E402
    AttentionEntry,
    EntryList,
    RecurrentEntry,
    caches_of,
    layer_caches,
    make_prompt_cache,
    prompt_cache,
)
from kvcache.errors import ForeignFileError  # noqa: E402

from . import tiny  # noqa: E402


def coded(start, stop, rows=1):
    """Keys [rows, 2, stop - start, 3] that encode their row and position."""
    positions = np.arange(start, stop, dtype=np.float32)[:, None]
    per_row = 1000 * np.arange(rows, dtype=np.float32)[:, None, None, None]
    return mx.array(np.broadcast_to(positions + per_row, (rows, 2, stop - start, 3)))


def filled(cache, tokens, start=0):
    entry = AttentionEntry(cache)
    if tokens:
        keys = coded(start, start + tokens)
        entry.update_and_fetch(keys, -keys)
    return entry


def seen(entry, row, tokens=1):
    """The keys that the latest query of a row sees, once `tokens` further ones came."""
    mask, rows = entry.make_mask(tokens, return_array=True), entry.rows
    keys = mx.full((rows, 2, tokens, 3), 9e5)
    columns, _ = entry.update_and_fetch(keys, keys)
    visible = np.array(columns)[row, 0, :, 0]
    if mask is not None:
        rule = np.array(mx.broadcast_to(mask, (rows, 1, tokens, columns.shape[2])))
        visible = visible[rule[row, 0, -1]]
    return visible[visible < 9e5].tolist()


# The protocol.


def test_the_protocol_of_mlx_lm_has_not_moved():
    """A method that comes, goes or changes its arguments is one to look at in the entries."""
    at = "look at kvcache/adapters/mlx_lm: mlx-lm changed the protocol of its caches: "
    wanted = {
        "KVCache": (AttentionEntry, {"step", "keys_and_values"}),
        "BatchKVCache": (AttentionEntry, {"step", "keys_and_values"}),
        "RotatingKVCache": (AttentionEntry, {"step", "keys_and_values"}),
        "BatchRotatingKVCache": (AttentionEntry, {"step", "keys_and_values"}),
        "ArraysCache": (RecurrentEntry, {"batch_size"}),
        "CacheList": (EntryList, set()),
    }
    for name, (ours, without) in wanted.items():
        theirs = getattr(library, name)
        methods = {key for key in dir(theirs) if not key.startswith("_")} - without
        assert methods <= set(dir(ours)), f"{at}{name} has {sorted(methods - set(dir(ours)))}"
    signatures = {
        "KVCache.update_and_fetch": "(self, keys, values)",
        "RotatingKVCache.make_mask": (
            "(self, N: int, window_size: Optional[int] = None, return_array: bool = False)"
        ),
        "BatchKVCache.prepare": ("(self, *, left_padding=None, lengths=None, right_padding=None)"),
        "ArraysCache.prepare": "(self, lengths=None, **kwargs)",
        "ArraysCache.advance": "(self, N)",
        "ArraysCache.make_mask": "(self, N: int)",
        "CacheList.extract": "(self, idx)",
        "make_prompt_cache": (
            "(model: mlx.nn.layers.base.Module, max_kv_size: Optional[int] = None) -> List[Any]"
        ),
    }
    for path, wanted_signature in signatures.items():
        function = library
        for part in path.split("."):
            function = getattr(function, part)
        found = str(inspect.signature(function))
        assert found == wanted_signature, f"{at}{path}{found}, not {wanted_signature}"
    source = inspect.getsource(library.load_prompt_cache)
    assert "globals()[c].from_state(" in source, f"{at}how files name classes"
    source = inspect.getsource(generate_step)
    assert "mx.eval([c.state for c in prompt_cache])" in source, f"{at}what is evaluated"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gemma3", "Rotating Rotating KV Rotating"),
        ("qwen3_next", "State KV State KV"),
        ("falcon_h1", "State KV State KV"),
    ],
)
def test_caches_are_those_of_the_layers(name, wanted):
    caches = layer_caches(tiny.model(name))
    kinds = [
        type(cache).__name__.removesuffix("Cache").removesuffix("KV") or "KV" for cache in caches
    ]
    assert " ".join(kinds) == wanted
    entries = prompt_cache(tiny.model(name), caches)
    assert all(a is b for a, b in zip(caches_of(entries), caches, strict=True))
    assert len(entries) == len(tiny.model(name).layers)


def test_a_size_holds_for_every_layer_that_has_no_smaller_window():
    model = tiny.model("gemma3")
    sizes = [
        [(cache.max_size, cache.keep) for cache in layer_caches(model, size, keep=2)]
        for size in (8, 20)
    ]
    assert sizes == [[(8, 2)] * 4, [(12, 0), (12, 0), (20, 2), (12, 0)]]
    with pytest.raises(ValueError, match=r"keep must be 0 to max_size - 1.*keep=4 with max_size=4"):
        make_prompt_cache(model, 4, keep=4)


def test_a_prompt_cache_wraps_caches_of_its_model_only():
    model = tiny.model("qwen3_next")
    with pytest.raises(ValueError, match=r"StateCache, KVCache, StateC.*; got KVCache, KVCache\."):
        prompt_cache(model, LayerCaches([KVCache("mlx"), RotatingKVCache(4)]))


class Model:
    def __init__(self, *caches):
        self.make_cache = lambda: list(caches)


def test_another_kind_of_cache_is_refused():
    with pytest.raises(NotSupportedError, match=r"this model has a ChunkedKVCache\. Use mlx-lm's"):
        make_prompt_cache(Model(library.KVCache(), library.ChunkedKVCache(8)))


def test_a_layer_that_never_advances_is_refused():
    [entry] = make_prompt_cache(Model(library.ArraysCache(size=1)))
    entry[0] = mx.zeros((1, 2))
    with pytest.raises(NotSupportedError, match=r"recurrent layer says advance\(tokens\) behind"):
        entry[0]
    assert entry[0] is None  # the assignment is forgotten


def test_quantization_is_refused():
    model = tiny.model("llama")
    with pytest.raises(NotSupportedError, match=r"dtype of the model; got kv_bits=4, kv_group_si"):
        tiny.stream(
            model,
            [1, 2, 3],
            4,
            prompt_cache=make_prompt_cache(model),
            kv_bits=4,
            quantized_kv_start=0,
        )


# Going back.


def test_trim_takes_back_tokens_or_raises():
    entry = filled(RotatingKVCache(6, backend="mlx", slack=4), 20)
    assert entry.trim(4) == 4
    assert entry.offset == 16
    with pytest.raises(TrimError, match="cannot trim once tokens were displaced"):
        entry.trim(1)
    full = filled(KVCache("mlx"), 3)
    assert full.trim(5) == 3
    assert full.empty()


def test_a_window_is_trimmable_by_a_draft_and_not_by_an_answer():
    entry = filled(RotatingKVCache(6, backend="mlx", slack=4), 5)
    assert entry.is_trimmable()
    assert entry.is_trimmable()
    keys = coded(5, 20)
    entry.update_and_fetch(keys, keys)
    assert entry.is_trimmable()
    assert not entry.is_trimmable()  # asked again, at rest: a cache of prompts
    assert copy.deepcopy(entry).is_trimmable()
    entry.update_and_fetch(keys[:, :, :1], keys[:, :, :1])
    assert entry.is_trimmable()
    entry.trim(1)
    assert not entry.is_trimmable()
    assert not entry.extract(0).is_trimmable()


def test_drafts_longer_than_were_asked_for_raise():
    model, drafter, prompt = tiny.model("gemma3"), tiny.drafter("gemma3"), tiny.prompt_of(30)
    few, many = (
        make_prompt_cache(model, drafts=n) + make_prompt_cache(drafter, drafts=n) for n in (2, 20)
    )
    with pytest.raises(TrimError, match="or a cache with slack for as many"):
        tiny.speculative(model, drafter, prompt, 40, few, drafts=20)
    expected = tiny.stream(model, prompt, 40)
    assert tiny.speculative(model, drafter, prompt, 40, many, drafts=20) == expected


def test_a_list_trims_all_entries_or_none():
    attention, state = filled(KVCache("mlx"), 4), RecurrentEntry(StateCache("mlx"), 1)
    state[0] = mx.ones((1, 2))
    state.advance(4)
    entries = EntryList(state, attention)
    assert not entries.is_trimmable()
    with pytest.raises(TrimError, match="goes back only to positions with a state"):
        entries.trim(1)
    assert (attention.offset, state.offset) == (4, 4)
    assert entries.trim(9) == 4


# Batches.

CACHES = [
    lambda: KVCache("mlx"),
    lambda: RotatingKVCache(6, backend="mlx", slack=2),
    lambda: RotatingKVCache(6, keep=2, backend="mlx", slack=2),
]


def expected_of(cache, tokens):
    """What the next query of a request alone sees."""
    window = getattr(cache, "max_size", 10**6) - getattr(cache, "keep", 0)
    keep = getattr(cache, "keep", 0)
    return [float(p) for p in range(tokens) if p < keep or p > tokens - window]


@pytest.mark.parametrize("new", CACHES, ids=["full", "ring", "sinks"])
@pytest.mark.parametrize("lengths", [[9, 3], [0, 5], [20, 0, 7], [0, 0]])
def test_requests_are_merged_and_extracted(new, lengths):
    merged = AttentionEntry.merge([filled(new(), length) for length in lengths])
    for row, length in enumerate(lengths):
        alone = merged.extract(row)
        assert alone.offset == length
        assert seen(alone, 0) == expected_of(new(), length)
        assert seen(copy.deepcopy(merged), row) == expected_of(new(), length)


@pytest.mark.parametrize("new", CACHES, ids=["full", "ring", "sinks"])
def test_padding_on_the_right_displaces_nothing(new):
    held = [11, 4, 0, 0]
    lengths, total = [2, 9, 5, 0], 9
    entry = AttentionEntry.merge([filled(new(), length) for length in held])
    right = [total - length for length in lengths]
    entry.prepare(lengths=lengths, right_padding=right)
    keys = mx.concatenate(
        [
            mx.concatenate([coded(start, start + n), mx.full((1, 2, total - n, 3), -7.0)], axis=2)
            for start, n in zip(held, lengths, strict=True)
        ]
    )
    for part in (keys[:, :, :4], keys[:, :, 4:]):
        entry.update_and_fetch(part, -part)
    entry.finalize()
    for row, (start, n) in enumerate(zip(held, lengths, strict=True)):
        assert seen(copy.deepcopy(entry), row) == expected_of(new(), start + n)
        assert entry.extract(row).offset == start + n


def test_rows_that_end_take_their_padding_along():
    entry = AttentionEntry.merge([filled(KVCache("mlx"), length) for length in (9, 3, 2)])
    entry.filter([2, 1])
    assert entry.cache.padding.tolist() == [1, 0]
    assert seen(copy.deepcopy(entry), 1) == [0, 1, 2]
    entry.extend(AttentionEntry.merge([filled(KVCache("mlx"), 0)]))
    assert (entry.rows, entry.offset.tolist()) == (3, [2, 3, 0])


def test_states_of_requests_of_unequal_length():
    entries = [RecurrentEntry(StateCache("mlx"), 1) for _ in range(3)]
    for entry, tokens in zip(entries, (4, 0, 2), strict=True):
        if tokens:
            entry[0] = mx.full((1, 2), float(tokens))
            entry.advance(tokens)
    batch = RecurrentEntry.merge(entries)
    assert batch[0][:, 0].tolist() == [4, 0, 2]
    assert batch.make_mask(3) is None
    batch.prepare(lengths=[1, 3, 2], right_padding=[2, 0, 1])
    assert batch.lengths.tolist() == [1, 3, 2]
    assert batch.make_mask(3).tolist() == [[True, False, False], [True] * 3, [True, True, False]]
    batch[0] = batch[0] + 1
    batch.advance(3)
    batch.finalize()
    assert batch.lengths is None
    assert [batch.extract(row).offset for row in range(3)] == [5, 3, 4]


def test_padding_on_the_left_is_declared_before_the_first_token():
    attention, state = AttentionEntry(KVCache("mlx")), RecurrentEntry(StateCache("mlx"), 1)
    entries = EntryList(state, attention)
    entries.prepare(left_padding=[2, 0])
    assert attention.offset.tolist() == [-2, 0]
    assert state.make_mask(3).tolist() == [[False, False, True], [True] * 3]


# Files.


def test_a_batch_is_saved_and_loaded(tmp_path):
    path = str(tmp_path / "batch.safetensors")
    entry = AttentionEntry.merge([filled(CACHES[2](), length) for length in (9, 8)])
    state = RecurrentEntry(StateCache("mlx"), 2)
    empty = AttentionEntry.merge([filled(KVCache("mlx"), 0)] * 3)
    library.save_prompt_cache(path, [EntryList(state, entry), empty], {"model": "m"})
    [entries, none], about = library.load_prompt_cache(path, return_metadata=True)
    assert about == {"model": "m"}
    assert none.empty()
    assert none.rows == 3
    assert entries[0].empty()
    assert entries[0].arrays == 2
    for row in range(2):
        assert seen(copy.deepcopy(entries[1]), row) == seen(copy.deepcopy(entry), row)


@pytest.mark.parametrize("text", ["x", "[]", '{"offset": 1}', "null"])
def test_the_state_of_something_else_is_refused(text):
    for kind in (AttentionEntry, RecurrentEntry):
        with pytest.raises(ForeignFileError, match="ends with a header"):
            kind.from_state([text])
    with pytest.raises(ForeignFileError, match=r"of the kinds AttentionEntry, RecurrentEntry; got"):
        EntryList.from_state([(["x"], "KVCache")])
