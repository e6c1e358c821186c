"""Run mlx-lm's own tests of its caches with ours in their place.

::

    pip download --no-binary mlx-lm --no-deps mlx-lm     # and unpack it
    MLX_LM_SOURCE=mlx_lm-... python -m pytest tests/adapters/mlx_lm/upstream.py

Models that the tests would download are tiny random ones here.
"""

import importlib.util
import os
import sys
from abc import ABCMeta
from pathlib import Path

import mlx.core as mx
from mlx_lm.models import cache as library
from mlx_lm.models import qwen2
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcache import KVCache, RotatingKVCache, StateCache
from kvcache.adapters import mlx_lm as ours

SOURCE = Path(os.environ["MLX_LM_SOURCE"])
SLACK = 16


class Kind(ABCMeta):
    """Makes entries pass for the stand-in of their kind."""

    def __instancecheck__(cls, entry):
        held = getattr(entry, "cache", None)
        return isinstance(entry, ours.AttentionEntry) and type(held) is cls.held


class Attention(ours.AttentionEntry):
    """Attributes of mlx-lm's caches that its tests read."""

    keys = property(lambda self: self.cache.state[0])
    values = property(lambda self: self.cache.state[1])
    step = 256
    max_size = property(lambda self: self.cache.max_size)
    keep = property(lambda self: self.cache.keep)
    rotated = batched = False

    def _with(self, cache):
        return Attention(cache)

    @classmethod
    def from_state(cls, state):
        return Attention(ours.AttentionEntry.from_state(state).cache)

    @property
    def offset(self):
        offset = super().offset
        one = self.batched and isinstance(offset, int)
        return mx.array([offset] * self.rows) if one else offset

    def _joined(self, entries):
        joined = super()._joined(entries)
        joined.batched = True
        return joined

    def extend(self, other):
        super().extend(other)
        self.batched = True

    @property
    def left_padding(self):
        padding = self.cache.padding
        return mx.array([0] * self.rows if padding is None else padding)

    def keys_and_values(self):
        return self.cache.state

    def _set(self, state):
        self.cache = ours.AttentionEntry.from_state(state).cache

    state = property(ours.AttentionEntry.state.fget, _set)


class Full(Attention, metaclass=Kind):
    held = KVCache

    def __init__(self):
        super().__init__(KVCache("mlx"))


class Rotating(Attention, metaclass=Kind):
    held = RotatingKVCache

    def __init__(self, max_size, keep=0):
        super().__init__(RotatingKVCache(max_size, keep, "mlx", slack=SLACK))


class BatchFull(Full):
    def __init__(self, left_padding):
        super().__init__()
        self.prepare(left_padding=left_padding)
        self._requests, self.batched = len(left_padding), True


class BatchRotating(Rotating):
    def __init__(self, max_size, left_padding):
        super().__init__(max_size)
        self.prepare(left_padding=left_padding)
        self._requests, self.batched = len(left_padding), True


class Arrays(ours.RecurrentEntry):
    """Assignments of all arrays count as a token: the tests do not call advance."""

    def __init__(self, size, left_padding=None):
        super().__init__(StateCache("mlx"), size)
        if left_padding:
            self.prepare(left_padding=left_padding)
            self._requests = len(left_padding)

    def _with(self, cache):
        clone = Arrays(self.arrays)
        clone.cache = cache
        return clone

    def __setitem__(self, index, array):
        super().__setitem__(index, array)
        if len(self._coming) == self.arrays and not self.cache.offset:
            self.advance(1)

    left_padding = Attention.left_padding

    @classmethod
    def from_state(cls, state):
        clone = cls(1)
        entry = ours.RecurrentEntry.from_state(state)
        clone.cache, clone.arrays, clone._requests = entry.cache, entry.arrays, entry._requests
        return clone


class Several(ours.EntryList):
    caches = property(lambda self: self.entries)

    @classmethod
    def from_state(cls, state):
        return cls(*(_kind(name).from_state(own) for own, name in state))


def _kind(name):
    return globals().get(name) or getattr(library, name)


def make_prompt_cache(model, max_kv_size=None):
    if hasattr(model, "make_cache"):  # a test has made some of these for its model
        return model.make_cache()
    made = ours.make_prompt_cache(model, max_kv_size)
    return [Attention(entry.cache) for entry in made]


def model():
    options = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=320,
        tie_word_embeddings=True,
    )
    mx.random.seed(0)
    built = qwen2.Model(options)
    mx.eval(built.parameters())
    return built


def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)} | {"<eos>": len(letters)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>")
    wrapped.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    return TokenizerWrapper(wrapped)


def load(*args, **kwargs):
    return model(), tokenizer()


STAND_INS = {
    "KVCache": Full,
    "RotatingKVCache": Rotating,
    "BatchKVCache": BatchFull,
    "BatchRotatingKVCache": BatchRotating,
    "ArraysCache": Arrays,
    "CacheList": Several,
    "make_prompt_cache": make_prompt_cache,
    "load": load,
}
for kind in (Attention, Full, Rotating, BatchFull, BatchRotating, Arrays, Several):
    setattr(library, kind.__name__, kind)
importlib.import_module("mlx_lm.utils").load = load
if not os.environ.get("MLX_LM_OWN"):  # the package has a function of the name of a module
    for patched in ("mlx_lm.generate", "mlx_lm.server", "mlx_lm.models.cache"):
        importlib.import_module(patched).make_prompt_cache = make_prompt_cache

for name in ("test_prompt_cache", "test_generate", "test_server"):
    spec = importlib.util.spec_from_file_location(f"upstream_{name}", SOURCE / f"tests/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for attribute, stand_in in STAND_INS.items():
        if hasattr(module, attribute) and (attribute == "load" or not os.environ.get("MLX_LM_OWN")):
            setattr(module, attribute, stand_in)
    for attribute, value in vars(module).items():
        if isinstance(value, type) and attribute.startswith("Test"):
            globals()[f"{attribute}"] = value
