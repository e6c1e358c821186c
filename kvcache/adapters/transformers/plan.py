"""The caches that the layers of a model need, by its configuration."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from kvcache.errors import NotSupportedError

ModelOrConfig: TypeAlias = PreTrainedModel | PreTrainedConfig


class LayerPlan(NamedTuple):
    """The caches of one layer.

    keys: whether it has keys and values. window: latest tokens that a query sees, itself included;
    None for all. state: whether it has a recurrent state. conv_only: whether that is one of a
    convolution alone.
    """

    keys: bool = False
    window: int | None = None
    state: bool = False
    conv_only: bool = False

    @property
    def caches(self) -> int:
        """Number of caches that the layer needs."""
        return self.keys + self.state


PLANS = {
    "full_attention": LayerPlan(keys=True),
    "sliding_attention": LayerPlan(keys=True),
    "chunked_attention": LayerPlan(keys=True),
    "conv": LayerPlan(state=True, conv_only=True),
    "linear_attention": LayerPlan(state=True),
    "hybrid": LayerPlan(keys=True, state=True),
    "hybrid_sliding": LayerPlan(keys=True, state=True),
    "dummy": LayerPlan(),
}
"""Caches by the name that the library has for a type of layer; windows are of the model."""


def layer_plans(config: PreTrainedConfig) -> list[LayerPlan]:
    """Return the plan of every layer of the decoder.

    Raises: NotSupportedError for a layer that kvcache has no cache for.
    """
    decoder = config.get_text_config(decoder=True)
    types, options = get_layer_types_and_kwargs(decoder)
    # T5 and its kin give the layers of the encoder as those of the model.
    if (depth := getattr(decoder, "num_decoder_layers", None)) is not None:
        types, options = types[:1] * depth, options[:1] * depth
    return [_plan(kind, kwargs) for kind, kwargs in zip(types, options, strict=True)]


def _plan(kind: str, options: dict[str, object]) -> LayerPlan:
    if kind not in PLANS:
        raise NotSupportedError(
            f"kvcache has caches for layers of the types {', '.join(PLANS)}; got {kind!r}. Use the "
            "library's DynamicCache for this model."
        )
    states, window = options.get("number_of_states", 1), options.get("sliding_window")
    if states != 1:
        raise NotSupportedError(
            f"a recurrent layer has one state; got {states}. Use the library's DynamicCache for "
            "this model."
        )
    return PLANS[kind]._replace(window=window if isinstance(window, int) else None)


def config_of(model_or_config: ModelOrConfig) -> PreTrainedConfig:
    """Return the configuration of a model, or the one given."""
    if isinstance(model_or_config, PreTrainedConfig):
        return model_or_config
    return model_or_config.config


def backend_for(model_or_config: ModelOrConfig) -> str | None:
    """Return the spec of the backend on the device of a model.

    None, the device of the first array, where that is not one for all layers, or unknown.
    """
    if isinstance(model_or_config, PreTrainedConfig) or hasattr(model_or_config, "hf_device_map"):
        return None
    device: torch.device = model_or_config.device
    return f"torch:{device}"
