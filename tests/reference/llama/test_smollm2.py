"""The end-to-end oracle: a real model says the same on every backend, with every cache."""

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import kvcache
from kvcache.reference.generate import generate

from .conftest import Windowed

pytestmark = pytest.mark.model

STEPS = 16  # of uncached generation, each of which feeds all tokens again
FEWER_STEPS = {"mlx": 2}  # its Linux wheel multiplies float32 matrices on one core, unvectorised


@pytest.fixture
def new(smollm2, recorded):
    """What a prompt goes on with: 64 tokens on NumPy and of the first prompt, 16 of the others."""
    whole = smollm2.backend.name == "numpy" or recorded["number"] == 0
    return recorded["new_ids"][: 64 if whole else 16]


def test_cached(smollm2, recorded, new):
    caches = smollm2.make_caches()
    assert list(generate(smollm2, recorded["prompt_ids"], caches, len(new))) == new


def test_uncached(smollm2, recorded, new):
    """Under a causal mask, one pass over all tokens takes all steps of uncached generation."""
    prompt = recorded["prompt_ids"]
    logits = smollm2([prompt + new[:-1]], last_only=False)
    chosen = smollm2.backend.to_host(logits)[0, len(prompt) - 1 :].argmax(-1)
    assert chosen.tolist() == new


@pytest.mark.parametrize("recorded", [0], indirect=True)
def test_uncached_step_by_step(smollm2, recorded):
    steps = FEWER_STEPS.get(smollm2.backend.name, STEPS)
    generated = list(generate(smollm2, recorded["prompt_ids"], None, steps))
    assert generated == recorded["new_ids"][:steps]


class SinkCache(kvcache.KVCache):
    """A full cache whose mask hides all but a window and the first tokens: the slow oracle."""

    keep, reach = 4, 12

    def mask(self, tokens, window=None):
        query = np.arange(self.offset - tokens, self.offset)[:, None]
        key = self.positions
        seen = (key >= 0) & (key <= query) & ((key < self.keep) | (key > query - self.reach))
        return self.backend.from_host(seen)


@pytest.fixture(scope="session")
def windowed(smollm2, story):
    """What a full cache says under the mask of each `keep`: tokens, and the logits after them."""
    backend, layers = smollm2.backend, smollm2.config.layers
    plain = smollm2.make_caches()
    sinks = [SinkCache(backend) for _ in range(layers)]
    return {0: said(smollm2, story, plain, window=16), 4: said(smollm2, story, sinks)}


def said(model, prompt, caches, chunk=None, window=None):
    tokens = list(generate(Windowed(model, window), prompt, caches, 8, prefill_chunk=chunk))
    return tokens, model.backend.to_host(model([tokens[-1:]], caches, window=window))


@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("keep", [0, 4])
def test_rotating_is_a_windowed_full_cache(smollm2, story, windowed, keep, chunk):
    caches = smollm2.make_caches("rotating", max_size=16, keep=keep)
    tokens, logits = said(smollm2, story, caches, chunk)
    expected, expected_logits = windowed[keep]
    assert tokens == expected
    np.testing.assert_allclose(logits, expected_logits, atol=2e-2)
    assert tokens != windowed[4 - keep][0], "the window makes no difference: nothing was shown"
    assert caches[0].len == 16
