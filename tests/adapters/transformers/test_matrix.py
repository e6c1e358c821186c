"""Models of transformers, run in every way with a cache of kvcache and with the library's own."""

from functools import partial

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache

from kvcache.adapters.transformers import make_cache

from .broken import broken_cache
from .models import EAGER_ONLY, MODELS, STATEFUL, model
from .ways import ORACLES, WAYS

EVERY_RUN = {
    ("mistral", "chunks of 5"),
    ("mistral", "assisted"),
    ("gemma3", "padded turns"),
    ("qwen3_next", "turns"),
    ("qwen3_next", "reselected"),
    ("falcon_h1", "beams"),
    ("lfm2", "assisted"),
    ("gemma3n", "greedy"),
    ("bamba", "assisted"),
}
"""Cells that are not left to the session for the whole matrix."""
DRAFTS = {"lookup", "assisted"}


def cells():
    for name in MODELS:
        for attention in ("eager", "sdpa"):
            for way in WAYS:
                if attention == "sdpa" and name in EAGER_ONLY:
                    continue
                often = attention == "eager" and (name, way) in EVERY_RUN
                marks = () if often else pytest.mark.matrix
                yield pytest.param(name, attention, way, marks=marks)


@pytest.mark.parametrize(("name", "attention", "way"), [*cells()])
def test_tokens_are_those_of_the_library(name, attention, way):
    built, run = model(name, attention), WAYS[way]
    if name in STATEFUL and way in DRAFTS:
        with pytest.raises(ValueError, match="not supported with stateful models"):
            run(built, partial(make_cache, built))
        return
    expected = ORACLES.get(way, run)(built, lambda: DynamicCache(config=built.config))
    assert len({token for line in expected for token in line}) >= 20
    assert run(built, partial(make_cache, built)) == expected
    assert run(built, partial(broken_cache, built)) != expected
