"""A cache that loses states, or mixes up values where a model has no states."""

import torch

from kvcache.adapters.transformers import ModelCache, layer_caches
from kvcache.adapters.transformers.layers import AttentionLayer, StateLayer


class BrokenCache(ModelCache):
    def __init__(self, config, caches, **options):
        super().__init__(config, caches, **options)
        recurrent = [layer for layer in self.layers if isinstance(layer, StateLayer)]
        for layer in recurrent:
            layer.handed = _forgetting(layer.handed)
        for layer in self.layers:
            if not recurrent and isinstance(layer, AttentionLayer):
                layer.update = _confused(layer.update)


def broken_cache(model):
    return BrokenCache(model.config, layer_caches(model))


def _forgetting(handed):
    def changed(number):
        state = handed(number)
        return None if state is None else torch.zeros_like(state)

    return changed


def _confused(update):
    def changed(*args, **kwargs):
        keys, values = update(*args, **kwargs)
        return keys, values.flip(-2)

    return changed
