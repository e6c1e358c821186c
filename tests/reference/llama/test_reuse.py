"""Logits after a hit are those of a cold run, for every kind of cache and every depth of a hit.

On NumPy bit for bit: the model computes in float64 there, what the caches hold and the logits are
float32, so that the order in which a matmul adds up, which depends on its shape, does not show.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import kvcache
from kvcache import Batch, CausalCache, KVCache, RotatingKVCache, WrapperCache
from kvcache.prefix import PrefixCache
from kvcache.reference.llama.model import Llama

CAUSAL = {
    "full": CausalCache,
    "window": lambda: CausalCache(window=6),
    "memory": lambda: CausalCache(window=4, memory=9),
    "chunk": lambda: CausalCache(chunk=8),
    "wrapped": lambda: WrapperCache(CausalCache(window=5), CausalCache()),
}
LAYERS = {
    "kv": KVCache,
    "ring": lambda backend: RotatingKVCache(8, 0, backend),
    "sinks": lambda backend: RotatingKVCache(9, 2, backend),
}
KINDS = [*CAUSAL, *LAYERS]


class Exact(Llama):
    """Computes in the dtype of its weights; what the caches hold is float32."""

    def _through(self, cache, k, v):
        keys, values = cache.update(k.astype(np.float32), v.astype(np.float32))
        return keys.astype(np.float64), values.astype(np.float64)


class LayerOfPool:
    """One layer of a sequence in a multi-sequence cache, as the model takes caches."""

    dtype = "float32"

    def __init__(self, cache, number, sequence):
        self.cache, self.number, self.sequence = cache, number, sequence

    @property
    def offset(self):
        return self.cache.next_position(self.sequence)

    def update(self, keys, values):
        if self.number == 0:
            start, count = self.offset, keys.shape[2]
            self.cache.start_forward(Batch(range(start, start + count), [self.sequence] * count))
        if isinstance(self.cache, WrapperCache):
            self.cache.set_layer_type(self.number % 2)
        self.cache.set_layer(self.number)
        self.cache.put(keys[0], values[0])
        keys, values, self.seen = self.cache.get()
        return keys[None], values[None]

    def mask(self, count, window):
        return self.seen


class ByLayer(Llama):
    """The window may differ by layer, so each has its own mask."""

    def _run(self, ids, caches, window):
        length, start = ids.shape[1], caches[0].offset
        cos, sin = self.angles(np.arange(start, start + length))
        x = self._embed(self.weights.embedding, self.backend.from_host(ids))
        for layer, cache in zip(self.weights.layers, caches, strict=True):
            q, k, v = self._project(layer, x, cos, sin)
            k, v = self._through(cache, k, v)
            mask = cache.mask(length, None)
            bias = None if mask is None else self._bias(mask)
            x = self._finish(layer, x, self._attend(q, k, v, bias))
        return x

    def _check_caches(self, caches):
        """In a pool the first layer begins the pass for all."""


class ExactByLayer(ByLayer, Exact):
    pass


def prefix_of(kind, backend):
    if kind in LAYERS:
        made = [LAYERS[kind](backend) for _ in range(2)]
        return PrefixCache(made), None
    cache = CAUSAL[kind]()
    cache.init(backend, max_sequences=2, capacity=60, max_batch=8)
    return PrefixCache(cache), cache


def logits_of(model, kind, prefix, cache, prompt, extra=()):
    """Logits behind every token of `prompt` that is computed, by position."""
    logits = {}
    with prefix.session(prompt) as session:
        if cache is None:
            layers = session.caches
        else:
            layers = [LayerOfPool(cache, i, session.sequence) for i in range(2)]
        ids, at = [*session.remaining.tolist(), *extra], session.matched
        for start in range(0, len(ids), 7):  # so that a window moves on within a prompt
            piece = ids[start : start + 7]
            out = model.backend.to_host(model([piece], layers, last_only=False))[0]
            for line in out:
                logits[at], at = line.astype(np.float32), at + 1
        session.extend(extra)
        return session.matched, logits


def conversations(model, kind, requests, same):
    prefix, cache = prefix_of(kind, model.backend)
    said, hits = [[]], set()
    for base, cut, more, extra in requests:
        before = said[base % len(said)]
        prompt = [*before[: cut % (len(before) + 1)], *more]
        hit, warm = logits_of(model, kind, prefix, cache, prompt, extra)
        _, cold = logits_of(model, kind, *prefix_of(kind, model.backend), prompt, extra)
        for position, line in warm.items():
            same(line, cold[position])
        said.append([*prompt, *extra])
        hits.add(hit)
    prefix.clear()
    assert prefix.stats.nbytes == 0
    return hits


TOKENS = st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=12)
REQUESTS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 50), TOKENS, TOKENS), min_size=2, max_size=6
)


@pytest.fixture(scope="module")
def exact(tiny_file):
    backend = kvcache.get_backend("numpy")
    model = Llama.from_gguf(tiny_file, backend)
    wide = type(model.weights)(
        *(
            tuple(type(layer)(*(part.astype(np.float64) for part in layer)) for layer in part)
            if isinstance(part, tuple)
            else part.astype(np.float64)
            for part in model.weights
        )
    )
    return ExactByLayer(tiny_file.config, wide, backend)


@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit_on_numpy(exact, kind):
    depths = set()

    @settings(max_examples=max(5, settings().max_examples // 8))
    @given(REQUESTS)
    def check(requests):
        depths.update(conversations(exact, kind, requests, np.testing.assert_array_equal))

    check()
    assert len(depths) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_on_every_backend(tiny, kind):
    """To what a matmul of another shape rounds otherwise."""
    if not tiny.backend.slices_are_views and kind not in {"full", "wrapped", "sinks"}:
        pytest.skip("every length is compiled by itself, and three kinds have all there is")
    model = ByLayer(tiny.config, tiny.weights, tiny.backend)
    rng = np.random.default_rng(5)
    requests = [(0, 0, rng.integers(0, 64, 12).tolist(), [5, 6])]
    requests += [(1, 14, [7] * 3, [8, 9]), (1, 9, [1, 2], [3]), (2, 30, [4], []), (1, 14, [2], [])]

    def same(warm, cold):
        np.testing.assert_allclose(warm, cold, rtol=2e-4, atol=2e-4)

    assert len(conversations(model, kind, requests, same)) > 2
