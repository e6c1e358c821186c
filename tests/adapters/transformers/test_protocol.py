"""The part of transformers on which the adapter rests: a failure says what moved, and where."""

import inspect

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import Cache, EncoderDecoderCache, GenerationMixin, cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.models.qwen3_next import modeling_qwen3_next

PARAMETERS = {
    Cache.__init__: "self layers layer_class_to_replicate offloading offload_only_non_sliding",
    Cache.update: "self key_states value_states layer_idx args kwargs",
    Cache.get_conv_state: "self layer_idx state_idx",
    Cache.get_recurrent_state: "self layer_idx state_idx",
    Cache.update_conv_state: "self conv_states layer_idx state_idx kwargs",
    Cache.update_recurrent_state: "self recurrent_states layer_idx state_idx kwargs",
    Cache.has_previous_state: "self layer_idx state_idx",
    Cache.get_mask_sizes: "self query_length layer_idx",
    Cache.get_seq_length: "self layer_idx",
    Cache.get_max_length: "self layer_idx",
    Cache.get_query_offset: "self layer_idx",
    Cache.is_recording_past: "self layer_idx",
    Cache.activate_past_recording: "self",
    Cache.crop: "self tokens_to_remove",
    Cache.reset: "self",
    Cache.reorder_cache: "self beam_idx",
    Cache.batch_repeat_interleave: "self repeats",
    Cache.batch_select_indices: "self indices",
    Cache.offload: "self layer_idx only_non_sliding",
    Cache.prefetch: "self layer_idx only_non_sliding",
    Cache.early_initialization: "self batch_size num_heads head_dim dtype device",
    CacheLayerMixin.update: "self key_states value_states args kwargs",
    CacheLayerMixin.lazy_initialization: "self key_states value_states",
    CacheLayerMixin.get_mask_sizes: "self query_length",
    LinearAttentionLayer.update_conv_state: "self conv_states state_idx conv_kernel_size kwargs",
    LinearAttentionLayer.update_recurrent_state: "self recurrent_states state_idx kwargs",
    EncoderDecoderCache.__init__: "self caches",
    EncoderDecoderCache.check_dynamic_cache: "self method",
    cache_utils.get_layer_types_and_kwargs: "config",
}
METHODS = {
    Cache: set(
        """
        activate_past_recording batch_repeat_interleave batch_select_indices batch_size crop
        early_initialization get_conv_state get_mask_sizes get_max_length get_query_offset
        get_recurrent_state get_seq_length has_previous_state is_compileable is_croppable is_dummy
        is_initialized is_linear is_recording_past is_sliding offload prefetch reorder_cache reset
        update update_conv_state update_indexer update_recurrent_state
    """.split()
    ),
    CacheLayerMixin: set(
        """
        get_mask_sizes get_max_length get_seq_length is_compileable is_croppable
        lazy_initialization offload prefetch reorder_cache reset supports_early_init update
    """.split()
    ),
    LinearAttentionCacheLayerMixin: set(
        """
        activate_past_recording crop get_max_length is_compileable is_croppable
        lazy_initialization offload prefetch reorder_cache reset supports_early_init
        update_conv_state update_recurrent_state
    """.split()
    ),
}
TYPES = set(
    """
    full_attention sliding_attention chunked_attention indexed_attention conv linear_attention
    hybrid hybrid_sliding dummy
""".split()
)


@pytest.mark.parametrize("function", [*PARAMETERS], ids=lambda each: each.__qualname__)
def test_parameters(function):
    given = " ".join(inspect.signature(function).parameters)
    assert given == PARAMETERS[function], (
        f"transformers changed the parameters of {function.__qualname__}: look at the method of "
        "this name in kvcache/adapters/transformers/cache.py and layers.py."
    )


@pytest.mark.parametrize("kind", [*METHODS], ids=lambda each: each.__name__)
def test_methods(kind):
    public = {name for name in dir(kind) if not name.startswith("_")}
    assert public == METHODS[kind], (
        f"transformers changed the methods of {kind.__name__}: see whether ModelCache, "
        "AttentionLayer or StateLayer inherit one that needs tensors of the library's own."
    )


def test_types_of_layers():
    known = {name for name, each in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.items() if is_own(each)}
    assert known == TYPES, (
        "transformers changed its types of layers: look at PLANS in "
        "kvcache/adapters/transformers/plan.py."
    )
    assert not issubclass(DummyLayer, CacheLayerMixin)


def is_own(kind):
    """Return whether the cache module itself has the class; modules of models add others."""
    return kind.__module__ == cache_utils.__name__


def test_generate_takes_a_cache():
    source = inspect.getsource(GenerationMixin._prepare_cache_for_generation)
    assert 'model_kwargs.get("cache")' in source, (
        "generate() has another name for its cache: change the snippets in docs/transformers.md."
    )


def test_steps_of_one_token_write_states_in_place():
    source = inspect.getsource(modeling_qwen3_next.Qwen3NextGatedDeltaNet.forward)
    condition = "if conv_state is not None and seq_len == 1 and not cache.is_recording_past("
    assert condition in source, (
        "recurrent layers of transformers step in another way: StateLayer.settle in "
        "kvcache/adapters/transformers/layers.py tells a step by what was written in place."
    )


def test_recurrent_caches_still_have_their_faults():
    """What the page about transformers says of the library's own cache."""
    assert not hasattr(LinearAttentionLayer, "batch_select_indices"), (
        "the library selects rows of recurrent states: change docs/transformers.md."
    )
    assert "recurrent_states" not in inspect.getsource(LinearAttentionLayer.crop), (
        "the library crops recurrent states: change docs/transformers.md."
    )
    assert hasattr(DynamicCache, "__iter__")
