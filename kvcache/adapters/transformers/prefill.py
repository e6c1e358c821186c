"""A prompt computed in pieces, so that recurrent layers leave the states that are wanted."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.layers.base import LayerCache
from kvcache.layers.stack import LayerCaches

from .cache import ModelCache

_STEPWISE = {"jamba", "mamba", "falcon_mamba"}
"""Models that forget their state where several tokens follow it in one pass (transformers 5.24)."""


@torch.no_grad()
def compute(model: PreTrainedModel, caches: LayerCaches[LayerCache], ids: Tensor) -> None:
    """Compute those of `ids`, ``[tokens]``, that `caches` do not hold yet.

    The library gives no state from inside of a pass, so there is one for every piece that ends
    where a state is wanted.
    """
    parameters = inspect.signature(model.forward).parameters
    cache = ModelCache(model.config, caches)
    ids = ids[None].to(model.device)
    for start, stop in _pieces(caches, ids.shape[1], model.config.model_type in _STEPWISE):
        options: dict[str, object] = {
            "position_ids": torch.arange(start, stop, device=ids.device)[None],
            "logits_to_keep": 1,
        }
        chosen = {name: value for name, value in options.items() if name in parameters}
        model(ids[:, start:stop], cache=cache, use_cache=True, **chosen)
    cache.settle()


def _pieces(
    caches: LayerCaches[LayerCache], stop: int, stepwise: bool
) -> Iterator[tuple[int, int]]:
    """Yield the ends of the passes that compute the tokens up to `stop`."""
    start = caches.offset
    if start == stop:
        return
    for end in [*caches.cuts(stop - start), stop]:
        size = 1 if stepwise and start else end - start
        for first in range(start, end, size):
            yield first, first + size
        start = end
