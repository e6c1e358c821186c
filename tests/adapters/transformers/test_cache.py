"""The cache of transformers: what it holds, where it goes back, and what it refuses."""

import copy
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import Cache, DynamicCache, PreTrainedConfig  # noqa: E402

import kvcache  # noqa: E402
from kvcache.adapters.transformers import (  # noqa: E402
    ModelCache,
    layer_caches,
    make_cache,
    make_encoder_decoder_cache,
)

from .models import CONFIGS, WINDOW, first, model  # noqa: E402
from .ways import WAYS, generate, lines, prompts  # noqa: E402


@torch.no_grad()
def forward(model, ids, cache):
    if model.config.model_type == "mamba2":  # has no positions
        return model(ids, cache=cache).logits
    start = 0 if cache is None else cache.get_seq_length()
    # Bamba counts from 0 in every call that is not told.
    positions = torch.arange(start, start + ids.shape[1]).expand(ids.shape)
    return model(ids, position_ids=positions, cache=cache).logits


def filled(name, ids=None):
    cache = make_cache(model(name))
    forward(model(name), prompts() if ids is None else ids, cache)
    return cache


def states_of(cache):
    caches = [each for each in cache.caches if isinstance(each, kvcache.StateCache)]
    return [array.clone() for each in caches for array in each.state]


def check_alike(arrays, others):
    assert len(arrays) == len(others) > 0
    for one, other in zip(arrays, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_it_is_a_cache_of_the_library_under_both_names():
    built = model("llama")
    cache = make_cache(built)
    assert isinstance(cache, Cache)
    expected = lines(generate(built, prompts(), cache))
    with pytest.warns(FutureWarning, match="past_key_values"):
        ids = built.generate(
            prompts(), past_key_values=make_cache(built), max_new_tokens=30, do_sample=False
        )
    assert lines(ids[:, prompts().shape[1] :]) == expected


@pytest.mark.parametrize(
    ("name", "attention", "together"),
    [
        ("llama", "sdpa", True),
        ("llama", "eager", False),
        ("gemma3", "sdpa", False),  # masks by layer
        ("falcon_h1", "sdpa", False),
    ],
)
def test_query_heads_of_a_key_head_are_multiplied_together(name, attention, together, monkeypatch):
    """They are where the library makes a mask for a step of one token."""
    built, heads = model(name, attention), []
    built.set_attn_implementation(attention)  # the configuration is that of other tests, too
    cache = make_cache(built)
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, *arguments, **options):
        heads.append(query.shape[1] == key.shape[1])
        return attend(query, key, *arguments, **options)

    forward(built, prompts(), cache)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    assert cache.is_compileable == together
    forward(built, prompts()[:, :1], cache)
    assert all(heads) == together or not heads
    assert bool(heads) == (attention == "sdpa")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", "kkkk"),
        ("gemma3", "rrrk"),
        ("qwen3_next", "sksk"),
        ("falcon_h1", "ksksksks"),
        ("gemma3n", "rk"),  # two layers read those of others
        ("llama4", "rrrk"),
        ("mamba2", "sss"),
    ],
)
def test_caches_of_the_layers(name, kinds):
    letters = {"k": kvcache.KVCache, "r": kvcache.RotatingKVCache, "s": kvcache.StateCache}
    built = model(name)
    for made in (layer_caches(built), layer_caches(built.config)):
        assert [type(cache) for cache in made] == [letters[kind] for kind in kinds]
        windows = [c.max_size for c in made if isinstance(c, kvcache.RotatingKVCache)]
        assert set(windows) <= {WINDOW}
    assert layer_caches(built)[0].backend.spec == "torch:cpu"
    assert layer_caches(built.config)[0].backend is None
    [roomy, *_] = layer_caches(model("llama"), capacity=600)
    assert roomy.options["capacity"] == 600


@pytest.mark.parametrize("name", first(["qwen3_next", "lfm2", "falcon_h1", "bamba", "mamba2"], 2))
def test_states_written_in_place_are_held_behind_their_position(name):
    """In steps of one token no method of the cache is called afterwards."""
    built, ids = model(name), prompts(tokens=14)
    cache = filled(name, ids[:, :9])
    snapshots = []
    for step in range(9, 14):
        snapshots.append((cache.caches.snapshot(), states_of(cache), copy.deepcopy(cache)))
        forward(built, ids[:, step : step + 1], cache)
        assert cache.caches.offset == step + 1
        assert cache.get_seq_length() == step + 1
    check_alike(states_of(cache), states_of(filled(name, ids)))
    last = forward(built, ids[:, :1], cache)
    # None of the later steps has reached what was taken before it.
    for step, (snapshot, states, clone) in enumerate(snapshots, 9):
        caches = layer_caches(built)
        caches.restore(snapshot)
        again = ModelCache(built.config, caches)
        for earlier in (again, clone):
            assert all(torch.equal(a, b) for a, b in zip(states_of(earlier), states, strict=True))
            forward(built, ids[:, step:], earlier)
            torch.testing.assert_close(
                forward(built, ids[:, :1], earlier), last, atol=1e-3, rtol=1e-3
            )
        snapshot.close()


def test_asking_for_a_state_counts_no_token():
    cache = filled("qwen3_next")
    before = cache.caches.offset
    for _ in range(3):
        assert cache.get_conv_state(0).shape == cache.get_conv_state(2).shape
        assert cache.get_recurrent_state(0) is not None
        assert cache.caches.offset == before
    assert make_cache(model("qwen3_next")).get_conv_state(0) is None


def test_a_reset_of_the_caches_themselves_gives_up_a_pass():
    caches = layer_caches(model("lfm2"))
    cache = ModelCache(CONFIGS["lfm2"], caches)
    for tokens in (9, 1):  # the second is written in place
        forward(model("lfm2"), prompts(tokens=tokens), cache)
        caches.reset()
        assert cache.caches.offset == 0
    whole = forward(model("lfm2"), prompts(), None)
    torch.testing.assert_close(forward(model("lfm2"), prompts(), cache), whole, atol=1e-3, rtol=0)


@pytest.mark.parametrize("settled", [False, True])
def test_an_interrupted_reading_counts_tokens_once(monkeypatch, settled):
    built, ids = model("lfm2"), prompts(tokens=10)
    cache = filled("lfm2", ids[:, :9])
    assert cache.caches.offset == 9
    forward(built, ids[:, 9:], cache)
    advance = kvcache.StateCache.advance

    def interrupted(*args):
        if settled:
            advance(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kvcache.StateCache, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = cache.caches
    assert cache.caches.offset == 10
    more = prompts(tokens=3, seed=1)
    whole = forward(built, torch.cat([ids, more], 1), None)[:, -3:]
    torch.testing.assert_close(forward(built, more, cache), whole, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", first(["qwen3_next", "mistral", "lfm2"]))
def test_inference_mode(name):
    built = model(name)
    expected = WAYS["turns"](built, lambda: make_cache(built))
    with torch.inference_mode():
        assert WAYS["turns"](built, lambda: make_cache(built)) == expected


@pytest.mark.parametrize("way", first(["greedy", "beams", "padded", "reset", "deepcopied"]))
def test_a_model_without_attention(way):
    built = model("mamba2")
    expected = WAYS[way](built, lambda: DynamicCache(config=built.config))
    assert WAYS[way](built, lambda: make_cache(built)) == expected


@pytest.mark.matrix
def test_a_model_without_attention_in_chunks():
    """The library asks its own cache for a length, which raises."""
    built = model("mamba2")
    with pytest.raises(ValueError, match="only contain LinearAttention"):
        WAYS["chunks of 5"](built, lambda: DynamicCache(config=built.config))
    cut, whole = (WAYS[way](built, lambda: make_cache(built)) for way in ("chunks of 5", "greedy"))
    assert cut == whole


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_sizes_of_masks_are_those_of_the_columns(name):
    built = model(name)
    cache = make_cache(built)
    keys = built.config.num_key_value_heads, 16
    for tokens in (3, 1, 8, 1, 1, 30, 1):
        for index, layer in enumerate(cache.layers):
            columns, first = cache.get_mask_sizes(tokens, index)
            update = torch.zeros(2, keys[0], tokens, keys[1])
            K, _ = cache.update(update, update, index)
            assert K.shape[-2] == columns
            assert first == layer.kv.positions[0]
    assert cache.get_max_length(0) == {"llama": -1}.get(name, WINDOW)


# Going back.


@pytest.mark.parametrize("name", ["llama", "mistral", "lfm2", "gemma3n"])
@pytest.mark.parametrize("removed", [0, 1, 4])
def test_crop_while_recording(name, removed):
    built, ids = model(name), prompts(tokens=30)
    cache = make_cache(built)
    cache.activate_past_recording()
    forward(built, ids[:, :20], cache)
    cache.crop(0)
    for stop in (24, 28):  # drafts, of which some tokens are accepted
        forward(built, ids[:, cache.get_seq_length() : stop], cache)
        cache.crop(-removed)
        assert cache.caches.offset == stop - removed
    clone = copy.deepcopy(cache)
    expected = forward(built, ids, None)[:, -1]
    for each in (cache, clone):
        rest = ids[:, each.get_seq_length() :]
        torch.testing.assert_close(forward(built, rest, each)[:, -1], expected, atol=1e-3, rtol=0)
        each.crop(-2)
        assert each.get_seq_length() == 28


def test_crop_of_more_than_since_the_last_one():
    cache = filled("llama")
    cache.activate_past_recording()
    forward(model("llama"), prompts(tokens=2), cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen3_next", "falcon_h1"])
def test_crop_refuses_what_it_cannot_do(name):
    """The library crops a recurrent layer without an error, and leaves its state as it was."""
    cache = filled(name)
    before = [each.offset for each in cache.caches]
    with pytest.raises(kvcache.TrimError):
        cache.crop(-3)
    assert [each.offset for each in cache.caches] == before
    cache.activate_past_recording()
    forward(model(name), prompts(tokens=3), cache)
    if name in ("qwen3_next", "falcon_h1"):
        assert not cache.is_croppable
        with pytest.raises(kvcache.TrimError, match="was not recorded"):
            cache.crop(-1)
        theirs = DynamicCache(config=model(name).config)
        forward(model(name), prompts(), theirs)
        theirs.activate_past_recording()
        forward(model(name), prompts(tokens=3), theirs)
        [layer] = [each for each in theirs.layers if hasattr(each, "recurrent_states")][:1]
        state = layer.recurrent_states[0].clone()
        theirs.crop(-1)
        assert torch.equal(layer.recurrent_states[0], state)
    with pytest.raises(ValueError, match="0 or less; got 2"):
        cache.crop(2)


def test_recording_ends_with_reset():
    cache = filled("mistral")
    cache.activate_past_recording()
    assert cache.is_recording_past(0)
    cache.reset()
    assert not cache.is_recording_past(0)
    assert not cache.is_initialized
    assert cache.caches.offset == 0


# Rows.


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "falcon_h1"])
def test_rows_are_selected_in_every_layer(name):
    """Where the library raises AttributeError, or selects the keys alone (Falcon-H1)."""
    built = model(name)
    theirs = DynamicCache(config=built.config)
    forward(built, prompts(3), theirs)
    if name == "falcon_h1":
        theirs.batch_select_indices(torch.tensor([1]))
        assert theirs.layers[0].keys.shape[0] == 1
        assert theirs.layers[0].recurrent_states[0].shape[0] == 3
    else:
        with pytest.raises(AttributeError):
            theirs.batch_select_indices(torch.tensor([1]))
    cache = filled(name, prompts(3))
    cache.batch_select_indices(torch.tensor([False, True, True]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    rows = [2, 2, 1, 1]
    check_alike(states_of(cache), states_of(filled(name, prompts(3)[rows])))
    assert {each.rows for each in cache.caches} == {4}


def test_rows_of_an_empty_cache():
    cache = make_cache(model("falcon_h1"))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(3)
    assert cache.caches.offset == 0


# Files, and other caches.


@pytest.mark.parametrize("name", first(["falcon_h1", "mistral"]))
def test_files(name, tmp_path):
    built, cache = model(name), filled(name)
    ids = torch.cat([prompts(), prompts(tokens=3, seed=1)], 1)
    cache.caches.save(tmp_path / "model")
    loaded = kvcache.LayerCaches.load(tmp_path / "model", backend="torch")
    again = ModelCache(built.config, loaded)
    assert lines(generate(built, ids, again)) == lines(generate(built, ids, cache))


def test_what_is_read_of_attention_layers():
    cache = filled("llama", prompts(2, 5))
    [layer, *_] = cache.layers
    assert layer.keys.shape == layer.values.shape == (2, 2, 5, 16)
    assert layer.is_initialized
    for name in ("keys", "values", "is_initialized"):
        with pytest.raises(AttributeError, match=f"{name} tells what the cache holds"):
            setattr(layer, name, None)
    empty = make_cache(model("llama"))
    assert (empty.layers[0].keys, empty.layers[0].values) == (None, None)
    assert not empty.is_initialized
    assert "LayerCaches 4 of KVCache" in repr(empty)


def test_a_refused_update_changes_nothing():
    cache = filled("llama", prompts(2, 5))
    update = torch.zeros(2, 2, 1, 16, dtype=torch.float64)
    with pytest.raises(kvcache.DTypeError):
        cache.update(update, update, 0)
    assert cache.caches.offset == 5


# Refusals.


def test_offloading_is_refused():
    cache = filled("llama")
    for call in (cache.offload, cache.prefetch):
        with pytest.raises(kvcache.NotSupportedError, match="stays on the device of its model"):
            call(0)


def test_layers_that_kvcache_has_no_cache_for():
    config = copy.deepcopy(CONFIGS["llama"])
    config.layer_types = ["full_attention", "indexed_attention"] * 2
    with pytest.raises(kvcache.NotSupportedError, match="got 'indexed_attention'"):
        make_cache(config)
    config.layer_types = ["linear_attention"] * 4
    config.number_of_conv_states = 2
    with pytest.raises(kvcache.NotSupportedError, match="has one state; got 2"):
        make_cache(config)


def test_states_that_kvcache_does_not_have():
    cache = make_cache(model("qwen3_next"))
    with pytest.raises(kvcache.NotSupportedError, match="state_idx=1"):
        cache.get_conv_state(0, 1)
    with pytest.raises(kvcache.NotSupportedError, match="update_recurrent_state alone"):
        cache.update_recurrent_state(torch.zeros(1, 2, 3, 4), 0)
    with pytest.raises(ValueError, match="layer 1 has no state; it is a AttentionLayer"):
        cache.get_conv_state(1)
    with pytest.raises(ValueError, match="layer 0 has no state"):
        make_cache(model("llama")).has_previous_state()


def test_caches_of_another_model():
    config = CONFIGS["qwen3_next"]
    with pytest.raises(ValueError, match="needs 4 caches for its 4 layers; got 1"):
        ModelCache(config, kvcache.LayerCaches([kvcache.KVCache()]))
    with pytest.raises(ValueError, match="needs a StateCache; got <KVCache"):
        ModelCache(config, kvcache.LayerCaches(kvcache.KVCache() for _ in range(4)))
    with pytest.raises(kvcache.NotSupportedError, match=r"got a LlamaConfig\. Use make_cache"):
        make_encoder_decoder_cache(CONFIGS["llama"])
    with pytest.raises(ValueError, match="capacity must be 0"):
        make_cache(CONFIGS["llama"], capacity=-1)
    assert np.array_equal(make_cache(PreTrainedConfig(num_hidden_layers=1)).is_sliding, [False])


def test_kvcache_imports_no_transformers():
    code = "import sys, kvcache, kvcache.adapters; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
