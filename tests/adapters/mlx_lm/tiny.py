"""Tiny random models of mlx-lm, whose greedy output varies, and ways to run them."""

import importlib
from functools import cache
from math import prod

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step

WINDOW = 12
VOCAB = 96
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
}
USUAL = dict(COMMON, num_hidden_layers=3, rms_norm_eps=1e-5, tie_word_embeddings=False)
TWO_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "llama": ("llama", USUAL),
    "qwen3": ("qwen3", dict(USUAL, max_position_embeddings=4096, rope_theta=1e4)),
    "gemma3": (
        "gemma3_text",
        dict(
            COMMON,
            num_hidden_layers=4,
            sliding_window=WINDOW,
            sliding_window_pattern=3,
            query_pre_attn_scalar=8,
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(
            COMMON,
            num_hidden_layers=3,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            rope_theta=1e4,
            layer_types=TWO_KINDS,
        ),
    ),
    "ministral": (
        "ministral3",
        dict(
            USUAL,
            sliding_window=WINDOW,
            layer_types=TWO_KINDS,
            rope_parameters={
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    "qwen3_next": (
        "qwen3_next",
        dict(
            COMMON,
            num_hidden_layers=4,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_conv_kernel_dim=4,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            shared_expert_intermediate_size=16,
            mlp_only_layers=[],
            moe_intermediate_size=16,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            partial_rotary_factor=0.5,
            max_position_embeddings=4096,
            full_attention_interval=2,
        ),
    ),
    "lfm2": (
        "lfm2",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 32,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "block_ff_dim": 48,
            "full_attn_idxs": [1, 3],
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        dict(
            COMMON,
            num_hidden_layers=2,
            mamba_d_ssm=32,
            mamba_d_head=8,
            mamba_n_heads=4,
            mamba_d_state=8,
            mamba_n_groups=2,
            mamba_chunk_size=16,
        ),
    ),
}
WINDOWED = ("gemma3", "gpt_oss", "ministral")
RECURRENT = ("qwen3_next", "lfm2", "falcon_h1")
# Seeds and sizes of weights with which the greedy output varies, and each kind of layer matters.
SEEDS = {"qwen3": 1, "falcon_h1": 3}
SCALES = {"qwen3": 4.0}
FACTORS = {
    "lfm2": {"conv.out_proj": 0.3, "self_attn": 1.5},
    "falcon_h1": {"mamba.out_proj": 0.1, "self_attn": 3.0},
}


def built(name, weights_of):
    """A model of this kind with ``weights_of(path, array)`` for what it was made with."""
    module, options = MODELS[name]
    library = importlib.import_module(f"mlx_lm.models.{module}")
    made = library.Model(library.ModelArgs.from_dict({**options, "model_type": module}))
    weights = [(path, weights_of(path, array)) for path, array in tree_flatten(made.parameters())]
    made.update(tree_unflatten(weights))
    mx.eval(made.parameters())
    return made


@cache
def model(name):
    """The model of this name."""
    mx.random.seed(SEEDS.get(name, 0))
    factors = FACTORS.get(name, {})

    def weights_of(path, array):
        larger = [factor for part, factor in factors.items() if part in path]
        return scaled(path, array, SCALES.get(name, 3.0) * prod(larger))

    return built(name, weights_of)


def scaled(path, array, scale):
    if path.endswith("A_log"):  # slow decay: the state behind the prompt matters
        return mx.log(mx.random.uniform(0.01, 0.2, array.shape))
    if path.endswith("dt_bias"):
        return mx.random.uniform(0.0, 0.5, array.shape)
    if array.ndim < 2:
        return array + 0.2 * mx.random.normal(array.shape)
    return mx.random.normal(array.shape) * scale / array.shape[-1] ** 0.5


def prompt_of(length, seed=0):
    mx.random.seed(1000 + seed)
    return mx.random.randint(1, VOCAB, (length,)).tolist()


def stream(model, prompt, tokens, **options):
    """The tokens that mlx-lm generates."""
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens, **options)
    return [token for token, _ in steps]


def stepwise(model, prompt, tokens, cache):
    """The tokens of a run one token at a time, the prompt included."""
    out = []
    for token in prompt:
        logits = model(mx.array([[token]]), cache=cache)
    while len(out) < tokens:
        out.append(mx.argmax(logits[0, -1]).item())
        logits = model(mx.array([[out[-1]]]), cache=cache)
    return out


def speculative(model, drafter, prompt, tokens, cache, drafts=4):
    """The tokens of speculative decoding."""
    steps = speculative_generate_step(
        mx.array(prompt),
        model,
        drafter,
        max_tokens=tokens,
        num_draft_tokens=drafts,
        prompt_cache=cache,
    )
    return [token for token, *_ in steps]


def batched(model, prompts, tokens, caches, **options):
    """The tokens of each request of a batch, and its prompt cache; each longer than the last."""
    generator = BatchGenerator(model, **options)
    numbers = generator.insert(prompts, [tokens + n for n in range(len(prompts))], caches=caches)
    out, left = {number: [] for number in numbers}, {}
    while responses := generator.next_generated():
        for response in responses:
            out[response.uid].append(response.token)
            left[response.uid] = response.prompt_cache
    generator.close()
    return [out[number] for number in numbers], [left[number] for number in numbers]


@cache
def drafter(name):
    """A model that agrees with `model(name)` in part."""
    mx.random.seed(7)
    exact = dict(tree_flatten(model(name).parameters()))
    return built(name, lambda path, _: noisy(exact[path]))


def noisy(array):
    return array + 0.02 * mx.random.normal(array.shape) * array
