"""Sizes and constants of a hybrid decoder, from the ``config.json`` of a checkpoint."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from kvcache.reference.errors import ModelFileError, UnsupportedModelError

Settings: TypeAlias = Mapping[str, object]
"""Keys of a ``config.json`` with their values."""

_LARGEST = (1 << 63) - 1
_MOST_LAYERS = 1 << 12  # a damaged number could ask for more than memory holds
_KINDS = {"linear_attention": True, "full_attention": False}


@dataclass(frozen=True)
class HybridConfig:
    """Sizes and constants of a hybrid decoder.

    recurrent: for each layer, True for a gated delta net and False for attention.
    sparse: for each layer, True for experts and False for one MLP.
    head_dim: dimensions of queries, keys and values of every attention head.
    rotary_dim: the first dimensions of a head, which are rotated by its position.
    delta_key_heads: key heads of a gated delta net; each serves ``delta_value_heads //
        delta_key_heads`` value heads in a row, of which each has a state matrix
        ``[delta_key_dim, delta_value_dim]``.
    kernel: tokens that the convolution sees, the token itself included.
    experts_per_token: experts of which a token takes the outputs.
    normalised: the weights of the experts of a token sum to 1.
    tied: the embedding is also the output matrix.
    """

    vocab_size: int
    hidden_size: int
    recurrent: tuple[bool, ...]
    sparse: tuple[bool, ...]
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    norm_eps: float
    delta_key_heads: int
    delta_value_heads: int
    delta_key_dim: int
    delta_value_dim: int
    kernel: int
    intermediate_size: int
    experts: int
    experts_per_token: int
    expert_size: int
    shared_expert_size: int
    normalised: bool
    tied: bool

    @property
    def layers(self) -> int:
        return len(self.recurrent)

    @property
    def delta_group(self) -> int:
        """Value heads of a gated delta net for each key head."""
        return self.delta_value_heads // self.delta_key_heads

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values of all heads."""
        keys = self.delta_key_heads * self.delta_key_dim
        return 2 * keys + self.delta_value_heads * self.delta_value_dim

    @classmethod
    def from_settings(cls, settings: Settings) -> HybridConfig:
        """Read the configuration in a ``config.json``, of any version of transformers.

        Raises: UnsupportedModelError for another architecture, or a variant of this one;
            ModelFileError if a key is missing.
        """
        _refuse_variants(settings)
        values = _Section(settings)
        recurrent = values.layer_types()
        head_dim = values["head_dim"]
        config = cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            recurrent=recurrent,
            sparse=values.sparse(len(recurrent)),
            heads=values["num_attention_heads"],
            kv_heads=values["num_key_value_heads"],
            head_dim=head_dim,
            rotary_dim=int(head_dim * values.rope("partial_rotary_factor")),
            rope_theta=values.rope("rope_theta"),
            norm_eps=values.number("rms_norm_eps"),
            delta_key_heads=values["linear_num_key_heads"],
            delta_value_heads=values["linear_num_value_heads"],
            delta_key_dim=values["linear_key_head_dim"],
            delta_value_dim=values["linear_value_head_dim"],
            kernel=values["linear_conv_kernel_dim"],
            intermediate_size=values["intermediate_size"],
            experts=values.experts,
            experts_per_token=values["num_experts_per_tok"],
            expert_size=values["moe_intermediate_size"],
            shared_expert_size=values["shared_expert_intermediate_size"],
            normalised=settings.get("norm_topk_prob", True) is True,
            tied=settings.get("tie_word_embeddings", False) is True,
        )
        _check_sizes(config)
        return config


class _Section:
    """Numbers among the keys of a ``config.json``."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        nested = settings.get("rope_parameters")
        # Up to version 4 of transformers they stand beside the other keys.
        self._rope: Settings = nested if isinstance(nested, Mapping) else settings
        experts = settings.get("num_experts")
        self.experts = self["num_experts"] if experts else 0

    def __getitem__(self, key: str) -> int:
        """Return the integer above 0 called `key`. Raise if there is none."""
        number = self.number(key)
        if not isinstance(number, int):
            raise _no_number(key, number)
        return number

    def number(self, key: str) -> float:
        return _number(self._settings, key)

    def rope(self, key: str) -> float:
        """Return the number above 0 called `key` among those of the rotation."""
        return _number(self._rope, key)

    def layer_types(self) -> tuple[bool, ...]:
        """Return for each layer whether it is recurrent."""
        count = self["num_hidden_layers"]
        _require(f"number of layers within {_MOST_LAYERS:,}", count <= _MOST_LAYERS, True)
        kinds = self._settings.get("layer_types")
        if kinds is None:
            interval = self["full_attention_interval"]
            return tuple((i + 1) % interval != 0 for i in range(count))
        named = [str(kind) for kind in kinds] if isinstance(kinds, list) else []
        if len(named) != count or not set(named) <= set(_KINDS):
            raise UnsupportedModelError(
                f"layer_types must name {' or '.join(_KINDS)} for each of {count} layers; "
                f"got {reprlib.repr(kinds)}. Use a checkpoint of Qwen3-Next."
            )
        return tuple(_KINDS[name] for name in named)

    def sparse(self, layers: int) -> tuple[bool, ...]:
        """Return for each layer whether it has experts."""
        dense = self._settings.get("mlp_only_layers")
        if dense is None:
            dense = []
        if not isinstance(dense, list):
            raise UnsupportedModelError(
                f"mlp_only_layers must be a list of layers; got {reprlib.repr(dense)}. "
                "Use a checkpoint of Qwen3-Next."
            )
        step = self["decoder_sparse_step"]
        return tuple(
            self.experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(layers)
        )


def _number(settings: Settings, key: str) -> float:
    """Return the number above 0 called `key`. Raise if there is none."""
    if key not in settings:
        raise ModelFileError(f"config.json must have a number called {key}; it is missing.")
    number = settings[key]
    # Python counts true and false among the numbers.
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _no_number(key, number)
    if not 0 < number <= _LARGEST:
        raise _no_number(key, number)
    return number


def _no_number(key: str, value: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{key} must be a finite number above 0, an integer if it is a size; "
        f"got {reprlib.repr(value)}. Use a checkpoint of Qwen3-Next."
    )


def _refuse_variants(settings: Settings) -> None:
    """Raise for a variant of the architecture: it would run, and silently generate rubbish."""
    _require("model_type", settings.get("model_type"), "qwen3_next")
    _require("hidden_act", settings.get("hidden_act", "silu"), "silu")
    _require("attention_bias", settings.get("attention_bias", False), False)
    _require("rope_scaling", settings.get("rope_scaling"), None)
    _require("quantization_config", settings.get("quantization_config"), None)
    rope = settings.get("rope_parameters")
    if isinstance(rope, Mapping):
        _require("rope_type", rope.get("rope_type", "default"), "default")


def _check_sizes(config: HybridConfig) -> None:
    """Raise for sizes that do not fit one another."""
    _require("heads modulo kv heads", config.heads % config.kv_heads, 0)
    _require(
        "linear value heads modulo key heads", config.delta_value_heads % config.delta_key_heads, 0
    )
    _require("rotated dimensions modulo 2", config.rotary_dim % 2, 0)
    _require("rotated dimensions within a head", 0 < config.rotary_dim <= config.head_dim, True)
    _require("convolution over more than one token", config.kernel > 1, True)
    if any(config.sparse):
        enough = config.experts_per_token <= config.experts
        _require("experts per token within the experts", enough, True)


def _require(what: str, got: object, needed: object) -> None:
    if got != needed:
        raise UnsupportedModelError(
            f"the reference hybrid runs models whose {what} is {needed!r}; "
            f"got {reprlib.repr(got)}. Use a checkpoint of Qwen3-Next."
        )
