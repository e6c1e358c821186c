"""The hybrid against a slow one that shares nothing with it, and against itself in pieces."""

import numpy as np
import pytest

import kvcache
from kvcache.errors import BoundsError, ShapeError, TrimError
from kvcache.reference.generate import generate
from kvcache.reference.hybrid.model import Hybrid

from .conftest import load
from .oracle import Oracle

IDS = np.random.default_rng(1).integers(0, 64, size=(2, 70))
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def in_pieces(model, ids, caches, sizes):
    """Logits of every token of `ids` [B, L], computed in calls of `sizes` tokens."""
    stops = np.cumsum(sizes)
    parts = [
        model(ids[:, stop - size : stop], caches, last_only=False)
        for size, stop in zip(sizes, stops, strict=True)
    ]
    assert stops[-1] == ids.shape[1]
    return np.concatenate([model.backend.to_host(part) for part in parts], axis=1)


def stepwise(model):
    """The same model, with the delta rule token by token."""
    return Hybrid(model.config, model.weights, model.backend, chunk=1)


@pytest.fixture(scope="module")
def expected(tiny_path):
    return np.stack([Oracle(tiny_path).logits(row) for row in IDS])


@pytest.fixture(scope="module")
def tiny_numpy(tiny_path):
    return load(tiny_path, kvcache.get_backend("numpy"))


def test_at_once(tiny, expected):
    every = tiny.backend.to_host(tiny(IDS, last_only=False))
    assert every.shape == (2, 70, 64)
    np.testing.assert_allclose(every, expected, **CLOSE)
    np.testing.assert_allclose(tiny.backend.to_host(tiny(IDS)), expected[:, -1], **CLOSE)


def test_stepwise(tiny, expected):
    every = tiny.backend.to_host(stepwise(tiny)(IDS, last_only=False))
    np.testing.assert_allclose(every, expected, **CLOSE)


@pytest.mark.parametrize("sizes", [(35, 35), (35, 1, 1, 1, 32), (1,) * 70], ids=str)
def test_in_calls(tiny, expected, sizes):
    caches = tiny.make_caches()
    np.testing.assert_allclose(in_pieces(tiny, IDS, caches, sizes), expected, **CLOSE)
    assert caches.offset == 70


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 33, 70])
def test_any_chunking(tiny_numpy, expected, chunk, size):
    model = Hybrid(tiny_numpy.config, tiny_numpy.weights, tiny_numpy.backend, chunk=chunk)
    sizes = [size] * (70 // size) + [70 % size] * (70 % size > 0)
    every = in_pieces(model, IDS, model.make_caches(), sizes)
    np.testing.assert_allclose(every, expected, **CLOSE)


def test_the_state_matters(tiny_numpy, expected):
    """A control: were the weights such that states hardly count, the other tests would be blind."""
    for lost in range(2):  # the inputs of the convolution, the matrix
        caches = tiny_numpy.make_caches()
        tiny_numpy(IDS[:, :60], caches)
        for cache in (caches[0], caches[2]):
            arrays = [array * (i != lost) for i, array in enumerate(cache.state)]
            cache.trim(60)
            cache.advance(60, *arrays)
        after = tiny_numpy(IDS[:, 60:], caches, last_only=False)
        assert np.abs(after - expected[:, 60:]).max() > 0.1


def test_greedy_tokens(tiny, tiny_path):
    prompt = IDS[0, :20].tolist()
    expected = Oracle(tiny_path).greedy(prompt, 12)
    caches = tiny.make_caches()
    assert list(generate(tiny, prompt, caches, 12, prefill_chunk=10)) == expected
    assert caches.offset == 20 + 12 - 1


def test_greedy_tokens_without_caches(tiny_numpy, tiny_path):
    prompt = IDS[0, :20].tolist()
    expected = Oracle(tiny_path).greedy(prompt, 12)
    assert list(generate(tiny_numpy, prompt, max_tokens=12)) == expected
    assert (
        list(generate(tiny_numpy, prompt, max_tokens=12, eos_id=expected[4]))
        == (expected[: expected.index(expected[4])])
    )


def test_without_caches_lengths_repeat(tiny_numpy, monkeypatch):
    """Or every one would be compiled by itself, where frameworks compile."""
    run, shapes = Hybrid._run, []

    def noting(self, ids, caches):
        shapes.append(ids.shape)
        return run(self, ids, caches)

    monkeypatch.setattr(Hybrid, "_run", noting)
    list(generate(tiny_numpy, [5] * 30, max_tokens=4))
    assert shapes == [(1, 32)] * 3 + [(1, 64)]


# States inside of a call.


def test_cuts(tiny, expected):
    """A state is recorded wherever one is asked for, and going back to it is going on from it."""
    caches = tiny.make_caches()
    caches.schedule([5, 35, 64])
    every = in_pieces(tiny, IDS, caches, [70])
    np.testing.assert_allclose(every, expected, **CLOSE)
    assert [cache.kept for cache in (caches[0], caches[2])] == [(5, 35, 64, 70)] * 2
    caches.trim(35)
    again = in_pieces(tiny, IDS[:, 35:], caches, [35])
    np.testing.assert_allclose(again, expected[:, 35:], **CLOSE)


def test_a_cut_on_the_grid_changes_no_bit(tiny_numpy):
    plain, cut = tiny_numpy.make_caches(), tiny_numpy.make_caches()
    cut.schedule([64])
    np.testing.assert_array_equal(
        tiny_numpy(IDS, plain, last_only=False), tiny_numpy(IDS, cut, last_only=False)
    )
    for one, other in zip(plain[0].state, cut[0].state, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_hit_equals_a_cold_run_of_the_same_calls(tiny_numpy):
    cold = tiny_numpy.make_caches()
    expected = in_pieces(tiny_numpy, IDS, cold, [41, 29])
    caches = tiny_numpy.make_caches()
    caches.schedule([41])
    tiny_numpy(IDS, caches)
    hit = tiny_numpy.make_caches()
    # The end of the snapshot restored is inside of the call that computed it.
    hit.restore(caches.snapshot(), stop=41)
    after = tiny_numpy(IDS[:, 41:], hit, last_only=False)
    np.testing.assert_allclose(after, expected[:, 41:], **CLOSE)
    caches.trim(29)
    np.testing.assert_array_equal(after, tiny_numpy(IDS[:, 41:], caches, last_only=False))


@pytest.mark.parametrize("accepted", range(6))
def test_speculation(tiny_numpy, expected, accepted):
    caches = tiny_numpy.make_caches()
    tiny_numpy(IDS[:, :40], caches)
    caches.checkpoint()
    draft = IDS[:, 40:45].copy()
    draft[:, accepted:] = (draft[:, accepted:] + 1) % 64  # the model agrees up to there
    tiny_numpy(draft, caches)
    caches.rollback(accepted)
    after = tiny_numpy(IDS[:, 40 + accepted :], caches, last_only=False)
    np.testing.assert_allclose(after, expected[:, 40 + accepted :], **CLOSE)


def test_a_position_without_a_state(tiny_numpy):
    caches = tiny_numpy.make_caches()
    tiny_numpy(IDS, caches)
    with pytest.raises(TrimError, match=r"only to positions with a state, \[0, 70\]"):
        caches.trim(1)


# Variants.


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"tie_word_embeddings": True}, [2]),
        ({"norm_topk_prob": False}, [2]),
        ({"num_experts_per_tok": 4, "mlp_only_layers": None}, []),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, [0, 2]),
        ({"num_experts": 0, "mlp_only_layers": []}, [0, 1, 2, 3]),
        ({"partial_rotary_factor": 1.0}, [2]),
    ],
    ids=str,
)
def test_variants(write_checkpoint, settings, dense):
    path = write_checkpoint(settings, dense=dense)
    model = load(path, kvcache.get_backend("numpy"))
    expected = Oracle(path).logits(IDS[0, :20])
    np.testing.assert_allclose(model(IDS[:1, :20], last_only=False)[0], expected, **CLOSE)


def test_settings_of_newer_versions(write_checkpoint, tiny_numpy):
    kinds = ["linear_attention", "full_attention"] * 2
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}
    changed = {"layer_types": kinds, "full_attention_interval": ..., "rope_parameters": rope}
    old = {"rope_theta": ..., "partial_rotary_factor": ..., "rope_scaling": ...}
    model = load(write_checkpoint(changed | old), tiny_numpy.backend)
    assert model.config == tiny_numpy.config


def test_keys_and_values_of_half_precision(tiny, expected):
    caches = tiny.make_caches(dtype="bfloat16")
    every = in_pieces(tiny, IDS, caches, [35, 35])
    assert caches[1].dtype == "bfloat16"
    assert caches[0].dtype == ("float32", "float32")
    np.testing.assert_allclose(every, expected, rtol=0.1, atol=0.3)


# Arguments.


def test_token_ids_are_checked(tiny_numpy):
    with pytest.raises(ShapeError, match=r"integers of shape \[batch, tokens\]"):
        tiny_numpy([1, 2])
    with pytest.raises(BoundsError, match=r"must lie in \[0, 64\); got 3 to 64"):
        tiny_numpy([[3, 64]])
    with pytest.raises(ValueError, match="chunk must be >= 1 token; got 0"):
        Hybrid(tiny_numpy.config, tiny_numpy.weights, tiny_numpy.backend, chunk=0)


def test_caches_are_checked(tiny_numpy):
    caches = tiny_numpy.make_caches()
    tiny_numpy(IDS[:, :3], caches)
    before = caches.copy()
    wrong = {
        "one cache per layer": caches[:3],
        "a StateCache for each recurrent one": [caches[1], caches[0], caches[2], caches[3]],
        r"all at one offset; got .* at \[0, 3\]": [*caches[:3], kvcache.KVCache()],
        "the state of 1 sequences has shapes": caches,
    }
    for message, given in wrong.items():
        with pytest.raises(ShapeError, match=message):
            tiny_numpy(IDS[:1, 3:5], given)
    np.testing.assert_array_equal(tiny_numpy(IDS[:, 3:], caches), tiny_numpy(IDS[:, 3:], before))
