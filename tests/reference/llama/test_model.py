"""The decoder against a slow one that shares nothing with it, and against itself in pieces."""

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import kvcache
from kvcache.errors import BoundsError, ShapeError
from kvcache.reference.llama.gguf import open_gguf
from kvcache.reference.llama.model import Llama

IDS = np.random.default_rng(1).integers(0, 64, size=(2, 40))
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def oracle(file, ids, visible=None):
    """Logits [L, vocab] in float64, head by head, rotating neighbours as complex numbers."""
    c, length = file.config, len(ids)
    causal = np.tri(length, dtype=bool)
    visible = causal if visible is None else causal & visible
    freqs = c.rope_theta ** -(np.arange(c.head_dim // 2) * 2 / c.head_dim)
    if "rope_freqs.weight" in file.tensors:
        freqs = freqs / file.read("rope_freqs.weight")
    turn = np.exp(1j * np.outer(np.arange(length), freqs))[:, None, :]

    def w(name):
        return file.read(f"{name}.weight").astype(np.float64)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * weight

    def rotate(x):
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w("token_embd")[ids]
    for blk in (f"blk.{i}" for i in range(c.layers)):
        h = norm(x, w(f"{blk}.attn_norm"))
        q, k, v = ((h @ w(f"{blk}.attn_{n}").T).reshape(length, -1, c.head_dim) for n in "qkv")
        q, k = rotate(q), rotate(k)
        out = []
        for head in range(c.heads):
            shared = head // (c.heads // c.kv_heads)
            scores = np.where(visible, q[:, head] @ k[:, shared].T / c.head_dim**0.5, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(out, -1) @ w(f"{blk}.attn_output").T
        h = norm(x, w(f"{blk}.ffn_norm"))
        gate = h @ w(f"{blk}.ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w(f"{blk}.ffn_up").T)) @ w(f"{blk}.ffn_down").T
    head_name = "output" if "output.weight" in file.tensors else "token_embd"
    return norm(x, w("output_norm")) @ w(head_name).T


def in_pieces(model, ids, caches, chunk, window=None):
    """Logits of every token of `ids` [B, L], computed `chunk` tokens at a time."""
    parts = [
        model(ids[:, i : i + chunk], caches, window=window, last_only=False)
        for i in range(0, ids.shape[1], chunk)
    ]
    return np.concatenate([model.backend.to_host(part) for part in parts], axis=1)


@pytest.fixture(scope="module")
def expected(tiny_file):
    return np.stack([oracle(tiny_file, row) for row in IDS])


@pytest.fixture(scope="module")
def tiny_numpy(tiny_file):
    return Llama.from_gguf(tiny_file, kvcache.get_backend("numpy"))


def test_uncached(tiny, expected):
    every = tiny.backend.to_host(tiny(IDS, last_only=False))
    assert every.shape == (2, 40, 64)
    np.testing.assert_allclose(every, expected, **CLOSE)
    last = tiny.backend.to_host(tiny(IDS))
    assert last.dtype == np.float32
    np.testing.assert_allclose(last, expected[:, -1], **CLOSE)


def test_uncached_shapes_repeat(tiny_numpy, monkeypatch):
    seen = []
    embed = tiny_numpy._embed
    monkeypatch.setattr(
        tiny_numpy, "_embed", lambda w, ids: seen.append(ids.shape[1]) or embed(w, ids)
    )
    for length in (1, 31, 32, 33, 40):
        tiny_numpy(IDS[:, :length])
    assert seen == [32, 32, 32, 64, 64]


@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_cached_in_chunks(tiny, expected, chunk):
    caches = tiny.make_caches()
    np.testing.assert_allclose(in_pieces(tiny, IDS, caches, chunk), expected, **CLOSE)
    assert [cache.offset for cache in caches] == [40, 40]


@pytest.mark.parametrize("chunk", [1, 5, 40])
@pytest.mark.parametrize("keep", [0, 4])
def test_rotating_is_a_window_with_sinks(tiny, tiny_file, chunk, keep):
    caches = tiny.make_caches("rotating", max_size=16, keep=keep)
    query, key = np.arange(40)[:, None], np.arange(40)
    visible = (query - key < 16 - keep) | (key < keep)
    expected = oracle(tiny_file, IDS[0], visible)
    np.testing.assert_allclose(in_pieces(tiny, IDS[:1], caches, chunk)[0], expected, **CLOSE)


@pytest.mark.parametrize("chunk", [7, 40])
def test_window_over_a_full_cache(tiny, tiny_file, chunk):
    expected = oracle(tiny_file, IDS[0], np.subtract.outer(np.arange(40), np.arange(40)) < 6)
    caches = tiny.make_caches()
    windowed = in_pieces(tiny, IDS[:1], caches, chunk, window=6)[0]
    np.testing.assert_allclose(windowed, expected, **CLOSE)
    uncached = tiny.backend.to_host(tiny(IDS[:1], window=6, last_only=False))[0]
    np.testing.assert_allclose(uncached, expected, **CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_caches_of_another_dtype(tiny, expected, dtype):
    caches = tiny.make_caches(dtype=dtype)
    logits = in_pieces(tiny, IDS, caches, 20)
    assert {cache.dtype for cache in caches} == {dtype}
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=0.2)
    assert not np.allclose(logits, expected, atol=1e-5), "nothing was rounded"


def test_only_standard_array_functions(tiny_file, expected):
    pytest.importorskip("array_api_strict")
    backend = kvcache.get_backend("array_api:array_api_strict")
    model = Llama.from_gguf(tiny_file, backend)
    caches = model.make_caches()
    np.testing.assert_allclose(in_pieces(model, IDS, caches, 20), expected, **CLOSE)


def test_untied_head_and_scaled_rotation(write_gguf, tiny_file, expected):
    rng = np.random.default_rng(2)
    tensors = {
        "output.weight": rng.normal(size=(64, 32)).astype(np.float32),
        "rope_freqs.weight": np.array([1, 1, 4, 8], np.float32),
    }
    for name, tensor in tensors.items():
        file = open_gguf(write_gguf(tensors={name: tensor}))
        model = Llama.from_gguf(file, kvcache.get_backend("numpy"))
        logits = model(IDS[:1], last_only=False)[0]
        np.testing.assert_allclose(logits, oracle(file, IDS[0]), **CLOSE)
        assert not np.allclose(logits, expected[0], atol=0.1), f"{name} has no effect"


def test_large_gates_do_not_overflow(write_gguf):
    gate = {"blk.0.ffn_gate.weight": np.full((64, 32), -1e4, np.float32)}
    file = open_gguf(write_gguf(tensors=gate))
    model = Llama.from_gguf(file, kvcache.get_backend("numpy"))
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(model(IDS)).all()


@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        ([1, 2], ShapeError, r"shape \[batch, tokens\].*got int64 \(2,\)"),
        ([[]], ShapeError, "at least one each"),
        ([[0.5]], ShapeError, "integers.*got float64"),
        ([[1, 64]], BoundsError, r"in \[0, 64\); got 1 to 64. Use the tokenizer"),
        ([[-1]], BoundsError, "got -1 to -1"),
    ],
)
def test_bad_tokens_change_nothing(tiny_numpy, tokens, error, says):
    caches = tiny_numpy.make_caches()
    with pytest.raises(error, match=says):
        tiny_numpy(tokens, caches)
    assert [cache.offset for cache in caches] == [0, 0]


def test_one_cache_per_layer_in_step(tiny_numpy):
    caches = tiny_numpy.make_caches()
    with pytest.raises(ShapeError, match=r"one cache per layer, 2, .* got 1 at \[0\]"):
        tiny_numpy([[1]], caches[:1])
    assert caches[0].offset == 0
    tiny_numpy([[1]], caches)
    caches[1].trim(1)
    with pytest.raises(ShapeError, match=r"all at one offset; got 2 at \[0, 1\]"):
        tiny_numpy([[1]], caches)
    assert caches[0].offset == 1


def test_bad_window_changes_nothing(tiny_numpy):
    caches = tiny_numpy.make_caches()
    for given in (caches, None):
        with pytest.raises(ValueError, match="window must be >= 1 token; got 0"):
            tiny_numpy([[1]], given, window=0)
    assert caches[0].offset == 0
