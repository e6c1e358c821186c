"""Numbers that the layers of models hold, by the family that their config names.

Decoders with attention alone have the same fields in all families. Those with recurrent layers have
names of their own, so each family has a function here. A family that has such fields and no
function is refused: its states would be left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable

from kvcache.errors import ForeignFileError, NotSupportedError

from .config import Config
from .shape import ModelShape, RecurrentLayers, TokenLayers

_ATTENDING = {"full_attention", "attention", "hybrid"}
_WINDOWED = {"sliding_attention", "local_attention"}
_CHUNKED = "chunked_attention"
_HEAD_DIM = "head_dim", "attention_head_dim", "kv_channels"
_SIGNS_OF_OTHERS = (
    # States.
    *("mamba_", "ssm_", "linear_", "conv_L", "rwkv", "retention", "lru_", "rglru", "lightning"),
    *("hybrid_", "time_mix", "block_types", "state_size", "conv_kernel", "mlstm", "gla_"),
    # Layers that share keys and values, or have heads of several sizes.
    *("num_kv_shared_layers", "global_head_dim", "cross_attention_layers"),
)
"""Beginnings of fields of families whose layers are not all plain attention."""


def model_shape(config: Config) -> ModelShape:
    """Return what one sequence holds in the model of a config.

    Raises: NotSupportedError for a family that is not known here, or has an encoder;
        ForeignFileError for a config without the fields of its family.
    """
    family = config.family
    if config.flag("is_encoder_decoder"):
        raise NotSupportedError(
            f"sizes are known of decoders; {config.name} is of {family}, with an encoder."
        )
    known = _FAMILIES.get(family)
    if known is not None:
        return known(config)
    signs = [field for field in config if field.startswith(_SIGNS_OF_OTHERS) and config.flag(field)]
    if signs:
        raise NotSupportedError(
            f"the sizes of layers of {family} are not known here: {config.name} has "
            f"{', '.join(sorted(signs)[:3])}. Beside decoders of plain attention these are known: "
            f"{', '.join(sorted(_FAMILIES))}."
        )
    return _attention_alone(config)


# Keys and values.


def _per_token(config: Config) -> int:
    """Return the numbers that an attention layer holds per token."""
    if "kv_lora_rank" in config:  # multi-head latent attention: one vector, without the heads
        return config.size("kv_lora_rank") + config.size("qk_rope_head_dim")
    heads = config.size("num_attention_heads", "n_head")
    if not heads:
        raise ForeignFileError(f"attention has heads; {config.name} has none.")
    if any(field in config for field in _HEAD_DIM):
        return 2 * _key_heads(config, heads) * config.size(*_HEAD_DIM)
    width = config.size("hidden_size", "n_embd", "d_model")
    return 2 * _key_heads(config, heads) * (width // heads)


def _key_heads(config: Config, heads: int) -> int:
    # Falcon-7B names a number of heads beside it, which does not count.
    if config.flag("multi_query") and not config.flag("new_decoder_architecture"):
        return 1
    fields = "num_key_value_heads", "num_kv_heads", "multi_query_group_num"
    return config.size(*fields, default=heads)


def _layers(config: Config) -> int:
    return config.size("num_hidden_layers", "n_layer", "num_layers")


def _kinds(config: Config, field: str) -> list[str]:
    """Return the kind of each layer."""
    kinds, layers = config.names(field), _layers(config)
    if len(kinds) != layers:
        raise ForeignFileError(
            f"{field} has a name for each of {layers} layers; {config.name} has {len(kinds)}."
        )
    return kinds


def _attention_alone(config: Config) -> ModelShape:
    numbers, layers = _per_token(config), _layers(config)
    windowed, window = _windowed_layers(config, layers)
    groups = [TokenLayers(layers - windowed, numbers), TokenLayers(windowed, numbers, window)]
    return ModelShape(config.family, layers, tuple(group for group in groups if group.layers))


def _windowed_layers(config: Config, layers: int) -> tuple[int, int]:
    """Return how many layers have a window, and its tokens."""
    if "layer_types" in config:
        return _windows_of(config, _kinds(config, "layer_types"))
    window = config.size("sliding_window", default=0)
    if not window or not config.flag("use_sliding_window", default=True):
        return 0, 0
    if "sliding_window_pattern" in config:  # one in so many layers sees everything
        pattern = max(1, config.size("sliding_window_pattern"))
        return layers - layers // pattern, window
    return _LAYERS_WITH_WINDOW.get(config.family, _all)(layers), window


def _windows_of(config: Config, kinds: list[str]) -> tuple[int, int]:
    """Return how many of the named layers have a window, and its tokens."""
    others = {*kinds} - _ATTENDING - _WINDOWED - {_CHUNKED}
    if others:
        raise NotSupportedError(
            f"layers of {config.family} are {', '.join(sorted(others))}; their sizes are not known "
            "here."
        )
    windowed, chunked = sum(kind in _WINDOWED for kind in kinds), kinds.count(_CHUNKED)
    if chunked:  # a token sees the beginning of its chunk, so a chunk is held like a window
        return chunked, config.size("attention_chunk_size")
    return (windowed, config.size("sliding_window")) if windowed else (0, 0)


def _all(layers: int) -> int:
    return layers


def _every_other(layers: int) -> int:
    return (layers + 1) // 2


def _five_of_six(layers: int) -> int:
    return layers - layers // 6


_LAYERS_WITH_WINDOW: dict[str, Callable[[int], int]] = {
    "gemma2": _every_other,
    "gemma3": _five_of_six,
    "gemma3_text": _five_of_six,
    "gpt_oss": _every_other,
}
"""Families whose configs do not say which layers have the window that they name."""


# Recurrent layers.


def _counted(config: Config, attending: int, states: int) -> None:
    """Refuse more layers than the model has."""
    layers = _layers(config)
    if attending > layers or states > layers:
        raise ForeignFileError(
            f"layers with attention, or with a state, are some of all {layers} layers; "
            f"{config.name} names {attending} and {states}."
        )


def _hybrid(config: Config, attending: int, states: int, conv: int, state: int) -> ModelShape:
    _counted(config, attending, states)
    tokens = (TokenLayers(attending, _per_token(config)),) if attending else ()
    recurrent = (RecurrentLayers(states, conv, state),) if states else ()
    return ModelShape(config.family, _layers(config), tokens, recurrent)


def _delta_net(config: Config) -> ModelShape:
    """Return the shape of Qwen3-Next and Qwen3.5: gated delta nets between attention layers."""
    layers = _layers(config)
    if "layer_types" in config:
        kinds = _kinds(config, "layer_types")
        states = sum(kind == "linear_attention" for kind in kinds)
        attending = sum(kind in _ATTENDING for kind in kinds)
    else:
        attending = layers // max(1, config.size("full_attention_interval", default=4))
        states = layers - attending
    key_heads = config.size("linear_num_key_heads")
    heads, keys = config.size("linear_num_value_heads"), config.size("linear_key_head_dim")
    values = config.size("linear_value_head_dim")
    channels = 2 * key_heads * keys + heads * values
    conv = channels * _held(config, "linear_conv_kernel_dim")
    return _hybrid(config, attending, states, conv, heads * keys * values)


def _held(config: Config, field: str) -> int:
    """Return the inputs that a convolution holds: one fewer than it sees."""
    return max(0, config.size(field) - 1)


def _kimi(config: Config) -> ModelShape:
    """Return the shape of Kimi-Linear: delta nets between layers of latent attention."""
    linear = config.part("linear_attn_config")
    states, attending = linear.numbers("kda_layers"), linear.numbers("full_attn_layers")
    heads, size = linear.size("num_heads"), linear.size("head_dim")
    conv = 3 * heads * size * _held(linear, "short_conv_kernel_size")
    return _hybrid(config, len(attending), len(states), conv, heads * size * size)


def _mamba2(
    config: Config, heads: int, head_dim: int, state: int, groups: int, kernel: str
) -> tuple[int, int]:
    """Return the numbers of the convolution and of the state of a Mamba-2 layer."""
    channels = heads * head_dim + 2 * groups * state
    return channels * _held(config, kernel), heads * head_dim * state


def _falcon(config: Config) -> ModelShape:
    """Return the shape of Falcon-H1: attention and Mamba-2 side by side in every layer."""
    layers, heads = _layers(config), config.size("mamba_n_heads")
    conv, state = _mamba2(
        config,
        heads,
        config.size("mamba_d_head"),
        config.size("mamba_d_state"),
        config.size("mamba_n_groups"),
        "mamba_d_conv",
    )
    return _hybrid(config, layers, layers, conv, state)


def _granite(config: Config) -> ModelShape:
    """Return the shape of Granite 4: Mamba-2 layers, and a few with attention."""
    kinds = _kinds(config, "layer_types")
    conv, state = _mamba2(
        config,
        config.size("mamba_n_heads"),
        config.size("mamba_d_head"),
        config.size("mamba_d_state"),
        config.size("mamba_n_groups"),
        "mamba_d_conv",
    )
    return _hybrid(config, kinds.count("attention"), kinds.count("mamba"), conv, state)


def _nemotron(config: Config) -> ModelShape:
    """Return the shape of Nemotron-H: Mamba-2 (M), attention (*) and plain (-) layers."""
    if "layers_block_type" in config:
        kinds = _kinds(config, "layers_block_type")
        attending, states = kinds.count("attention"), kinds.count("mamba")
    else:
        pattern = config.text("hybrid_override_pattern")
        attending, states = pattern.count("*"), pattern.count("M")
    conv, state = _mamba2(
        config,
        config.size("mamba_num_heads"),
        config.size("mamba_head_dim"),
        config.size("ssm_state_size"),
        config.size("n_groups"),
        "conv_kernel",
    )
    return _hybrid(config, attending, states, conv, state)


def _lfm(config: Config) -> ModelShape:
    """Return the shape of LFM2: short convolutions, and attention in the other layers."""
    layers = _layers(config)
    if "layer_types" in config:
        attending = _kinds(config, "layer_types").count("full_attention")
    else:
        attending = len(config.numbers("full_attn_idxs"))
    conv = config.size("hidden_size") * _held(config, "conv_L_cache")
    return _hybrid(config, attending, layers - attending, conv, 0)


def _jamba(config: Config) -> ModelShape:
    """Return the shape of Jamba: Mamba layers, and one with attention in each period."""
    layers, period = _layers(config), max(1, config.size("attn_layer_period"))
    attending = len(range(config.size("attn_layer_offset"), layers, period))
    channels = config.size("mamba_expand") * config.size("hidden_size")
    conv = channels * _held(config, "mamba_d_conv")
    return _hybrid(
        config, attending, layers - attending, conv, channels * config.size("mamba_d_state")
    )


_FAMILIES: dict[str, Callable[[Config], ModelShape]] = {
    "falcon_h1": _falcon,
    "granitemoehybrid": _granite,
    "jamba": _jamba,
    "kimi_linear": _kimi,
    "lfm2": _lfm,
    "lfm2_moe": _lfm,
    "nemotron_h": _nemotron,
    "qwen3_5": _delta_net,
    "qwen3_5_moe": _delta_net,
    "qwen3_5_moe_text": _delta_net,
    "qwen3_5_text": _delta_net,
    "qwen3_next": _delta_net,
}
