"""Generate with a model of mlx-lm over caches of kvcache, save them, and go on.

python examples/mlx_lm_generate.py                 # a tiny model with random weights
python examples/mlx_lm_generate.py MODEL PROMPT    # a checkpoint, by name or folder
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm import load, stream_generate
from mlx_lm.generate import generate_step
from mlx_lm.models import lfm2

import kvcache
from kvcache.adapters.mlx_lm import caches_of, make_prompt_cache, prompt_cache


def tiny_model() -> lfm2.Model:
    """Return a hybrid, of which every other layer is a convolution, with random weights."""
    mx.random.seed(0)
    return lfm2.Model(
        lfm2.ModelArgs(
            model_type="lfm2",
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            norm_eps=1e-5,
            conv_bias=False,
            conv_L_cache=3,
            block_dim=32,
            block_multiple_of=8,
            block_ffn_dim_multiplier=1.0,
            block_auto_adjust_ff_dim=False,
            block_ff_dim=48,
            full_attn_idxs=[1, 3],
        )
    )


def generated(model: Module, prompt: list[int], cache: list[Any], tokens: int) -> list[int]:
    """Return the tokens that follow `prompt`."""
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens, prompt_cache=cache)
    return [token for token, _ in steps]


def show_tiny() -> None:
    """Generate, save, load, and compare with one run."""
    model, prompt, turn = tiny_model(), list(range(40)), [7, 8, 9]
    cache = make_prompt_cache(model)
    first = generated(model, prompt, cache, 20)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.safetensors"
        caches_of(cache).save(path)
        print(f"{caches_of(cache)} in {path.stat().st_size:,} bytes")
        loaded = kvcache.LayerCaches.load(path, backend="mlx")
    again = generated(model, turn, prompt_cache(model, loaded), 20)
    cold = generated(model, [*prompt, *first, *turn], make_prompt_cache(model), 20)
    print("from the file: the same tokens as in one run:", again == cold)


def show(name: str, prompt: str) -> None:
    """Stream the answer of a checkpoint."""
    model, tokenizer = load(name)
    cache = make_prompt_cache(model)
    for response in stream_generate(model, tokenizer, prompt, prompt_cache=cache):
        print(response.text, end="", flush=True)
    print(f"\n{caches_of(cache)}")


if __name__ == "__main__":
    show(*sys.argv[1:]) if sys.argv[1:] else show_tiny()
