"""Caches of transformers and of the adapter for it, compared on tiny models of the library."""

from functools import cache

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from kvcache.errors import NotSupportedError  # noqa: E402
from kvcache.verify import SCENARIOS, verify, verify_reuse  # noqa: E402
from kvcache.verify.targets.transformers import CACHES, TransformersTarget  # noqa: E402
from kvcache.verify.targets.transformers_models import CONFIGS, load  # noqa: E402

CELLS = [(model, cache) for model in CONFIGS for cache in CACHES]
RECURRENT = {"qwen3_next", "lfm2"}
IN_CI = {("mistral", "dynamic"), ("mistral", "ours-prefix"), ("qwen3_next", "ours")}


model = cache(load)  # each is made once


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*cell, marks=() if cell in IN_CI else pytest.mark.matrix) for cell in CELLS],
)
def test_every_model_and_cache(name, kind):
    target = TransformersTarget(model(name), kind)
    if kind == "ours-static" and name in RECURRENT:
        with pytest.raises(NotSupportedError, match="recurrent"):
            verify(target, runs=1)
        return
    wrong = {"drafts"} if (name, kind) == ("lfm2", "static") else set()  # see below
    verify_reuse(target, runs=1, scenarios=[each for each in SCENARIOS if each not in wrong])


def test_drafts_past_a_window_of_the_fixed_cache():
    """Cropped without being asked whether it can, it goes on with other tokens."""
    target = TransformersTarget(model("mistral"), "static", checked=False)
    [result] = verify(target, runs=2, scenarios=["drafts"]).results
    assert result.verdict == "different"
    assert result.finding.divergence.against == "cold run"
    assert result.finding.layer == 0
    checked = verify_reuse(TransformersTarget(model("mistral"), "static"), 2, 0, ["drafts"])
    assert checked.results[0].refused > 0


@pytest.mark.matrix
def test_drafts_of_one_token_in_a_fixed_cache_with_convolutions():
    """While they record the past, the library makes no mask, and empty slots are seen."""
    [result] = verify(
        TransformersTarget(model("lfm2"), "static"), runs=1, scenarios=["drafts"]
    ).results
    assert result.verdict == "different"
    assert result.finding.layer == 1, "of attention"
    verify_reuse(TransformersTarget(model("lfm2"), "ours"), 4, 0, ["drafts"])


class PaddingInSight(TransformersTarget):
    """Hides no column on the left of a row."""

    def forward(self, cache, rows, padding=(0,)):
        return super().forward(cache, rows, [0] * len(rows))


def test_padding_that_is_not_hidden_is_found():
    [result] = verify(
        PaddingInSight(model("mistral"), "ours"), runs=1, scenarios=["batches"]
    ).results
    assert result.verdict == "different"
    assert len(result.finding.script) <= 3


class LosesPosition(DynamicCache):
    """Says one token too few, once tokens were taken back."""

    cropped = False

    def crop(self, tokens_to_remove):
        self.cropped = self.cropped or tokens_to_remove < 0
        super().crop(tokens_to_remove)

    def get_seq_length(self, layer_idx=0):
        return super().get_seq_length(layer_idx) - (self.cropped and len(self.layers) > 0)


def test_a_cache_of_ones_own():
    def lossy(llama):
        return LosesPosition(config=llama.config)

    target = TransformersTarget(model("llama"), lossy)
    assert target.name == "transformers llama, lossy"
    with pytest.raises(AssertionError, match="trims"):
        verify_reuse(target, 2, 0, ["ones", "trims"])


def test_unknown_caches_are_refused():
    with pytest.raises(ValueError, match=r"caches are dynamic, static, .*; got 'no'"):
        TransformersTarget(model("llama"), "no")
