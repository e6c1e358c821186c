"""Prompt caches of mlx-lm and of the adapter for it, compared on tiny models of the library."""

from functools import cache

import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from kvcache.verify import verify, verify_reuse
from kvcache.verify.targets.mlx_lm import CACHES, MlxLmTarget
from kvcache.verify.targets.mlx_models import MODELS, load

CELLS = [(model, cache) for model in MODELS for cache in CACHES]
IN_CI = {("gemma3", "library-lru"), ("gemma3", "ours"), ("qwen3_next", "ours-prefix")}


model = cache(load)  # each is made once


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*cell, marks=() if cell in IN_CI else pytest.mark.matrix) for cell in CELLS],
)
def test_every_model_and_cache(name, kind):
    verify_reuse(MlxLmTarget(model(name), kind), runs=1)


def test_drafts_past_a_window_of_the_library():
    """Asked once whether it can be trimmed, as by speculative decoding, it keeps drafts later."""
    target = MlxLmTarget(model("gemma3"), "library", checked=False)
    [result] = verify(target, runs=2, scenarios=["drafts"], first_only=True).results
    assert result.verdict == "different"
    assert result.finding.layer == 0
    ours = MlxLmTarget(model("gemma3"), "ours", checked=False)
    assert verify_reuse(ours, 2, 0, ["drafts"]).results[0].refused == 0


def test_sinks_in_a_prefill_of_several_passes():
    """The library loses them there, and is right one token at a time."""
    target = MlxLmTarget(model("qwen3"), "library", max_kv_size=12)
    ones, fives = verify(target, runs=2, scenarios=["ones", "fives"]).results
    assert (ones.verdict, fives.verdict) == ("equal", "different")
    assert fives.finding.divergence.against == "run without a cache"
    verify_reuse(MlxLmTarget(model("qwen3"), "ours", max_kv_size=12), 2, 0, ["ones", "fives"])


@pytest.mark.matrix
def test_sinks_in_a_batch():
    """The library loses them where it joins caches."""
    target = MlxLmTarget(model("qwen3"), "library", max_kv_size=12)
    [result] = verify(target, runs=4, scenarios=["batches"]).results
    assert result.verdict == "different"
    verify_reuse(MlxLmTarget(model("qwen3"), "ours", max_kv_size=12), 4, 0, ["batches"])


def test_unknown_caches_are_refused():
    with pytest.raises(ValueError, match=r"caches are library, .*; got 'no'"):
        MlxLmTarget(model("llama"), "no")
