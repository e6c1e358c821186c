"""A tokenizer for the tiny models: the word w07 is token 7."""

import json
from functools import cache

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tiny import MODELS, VOCAB, model

TURNS = (
    "{% for message in messages %}"
    "{{ {'system': 'w90 ', 'user': 'w91 ', 'assistant': 'w92 '}[message.role] }}"
    "{{ message.content }} w93 "
    "{% endfor %}{% if add_generation_prompt %}w92{% endif %}"
)
"""A chat template: a word for each role, the content, and a word behind it."""


def fast_tokenizer():
    words = Tokenizer(
        models.WordLevel({f"w{token:02}": token for token in range(VOCAB)}, unk_token="w01")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w00", unk_token="w01", chat_template=TURNS
    )


@cache
def tokenizer():
    return TokenizerWrapper(fast_tokenizer())


def text_of(tokens):
    return " ".join(f"w{token:02}" for token in tokens)


def save(name, folder):
    """Write the model of this name, as mlx-lm reads models."""
    kind, options = MODELS[name]
    (folder / "config.json").write_text(json.dumps(dict(options, model_type=kind)))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model(name).parameters()))
    )
    fast_tokenizer().save_pretrained(folder)
