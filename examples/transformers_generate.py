"""Generate with a model of transformers over caches of kvcache, save them, and go on.

python examples/transformers_generate.py                 # a tiny model with random weights
python examples/transformers_generate.py MODEL PROMPT    # a checkpoint, by name or folder
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3NextConfig

import kvcache
from kvcache.adapters.transformers import ModelCache, make_cache


def tiny_model() -> PreTrainedModel:
    """Return a hybrid, of which every other layer is recurrent, with random weights."""
    config = Qwen3NextConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def main(arguments: list[str]) -> None:
    """Generate twice: in one run, and with the caches in a file in between."""
    if arguments:
        name, prompt = arguments
        model = AutoModelForCausalLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        model, tokenizer = tiny_model(), None
        ids = torch.randint(1, 300, (1, 40))

    cache = make_cache(model)
    first = model.generate(ids, cache=cache, max_new_tokens=20, do_sample=False)
    print(f"{cache.caches} in {cache.caches.nbytes:,} bytes")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.safetensors"
        cache.caches.save(path)
        caches = kvcache.LayerCaches.load(path, backend=f"torch:{model.device}")
    again = ModelCache(model.config, caches)
    second = model.generate(first, cache=again, max_new_tokens=20, do_sample=False)
    whole = model.generate(ids, max_new_tokens=40, do_sample=False)
    print(f"from the file: the same tokens as in one run: {torch.equal(second, whole)}")
    if tokenizer is not None:
        print(tokenizer.decode(second[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
