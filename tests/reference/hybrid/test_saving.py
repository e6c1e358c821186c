"""Checkpoints that are written: what is read again, here and by transformers."""

import random

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import kvcache
from kvcache.reference.errors import UnsupportedModelError
from kvcache.reference.hybrid.checkpoint import Checkpoint
from kvcache.reference.hybrid.config import HybridConfig
from kvcache.reference.hybrid.corpus import (
    END,
    LONGEST,
    SPECIAL,
    TEMPLATE,
    conversation,
    pairs,
    shuffled,
)
from kvcache.reference.hybrid.saving import byte_tokenizer, save_checkpoint, tensors_of
from kvcache.reference.hybrid.tokenizer import read_tokenizer
from kvcache.reference.hybrid.weights import load_weights

from .conftest import SETTINGS, load, tiny_tensors

DENSE = {"num_experts": 0, "mlp_only_layers": []}
IDS = np.random.default_rng(3).integers(0, 64, (1, 20))


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_are_those_that_were_read(write_checkpoint, tied):
    tensors = tiny_tensors(dense=(0, 1, 2, 3))
    head = {"lm_head.weight": ...} if tied else {}
    path = write_checkpoint(DENSE | {"tie_word_embeddings": tied}, head, dense=(0, 1, 2, 3))
    file, backend = Checkpoint(path), kvcache.get_backend("numpy")
    written = tensors_of(file.config, load_weights(file, backend.from_host), backend)
    assert written.keys() == {name for name in tensors if not (tied and name == "lm_head.weight")}
    for name, tensor in written.items():
        np.testing.assert_allclose(tensor, tensors[name], rtol=1e-5, atol=1e-6)
        assert tensor.shape == tensors[name].shape


def test_experts_are_refused(tiny_path):
    file, backend = Checkpoint(tiny_path), kvcache.get_backend("numpy")
    weights = load_weights(file, backend.from_host)
    with pytest.raises(UnsupportedModelError, match="this one has experts"):
        tensors_of(file.config, weights, backend)


@pytest.fixture
def saved(write_checkpoint, tmp_path):
    """A directory written from a model on NumPy, and its logits."""
    settings = SETTINGS | DENSE | {"vocab_size": 260}
    big = np.random.default_rng(0).normal(size=(260, 32)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": big, "lm_head.weight": big}
    path = write_checkpoint(settings, tensors, dense=(0, 1, 2, 3))
    model = load(path, kvcache.get_backend("numpy"))
    tokenizer = byte_tokenizer(SPECIAL)
    target = tmp_path / "new" / "model"
    save_checkpoint(
        target, settings, model.weights, model.backend, tokenizer, template=TEMPLATE, end=END
    )
    return target, model(IDS, last_only=False)


def test_a_directory(saved):
    path, logits = saved
    model, file = load(path, kvcache.get_backend("numpy")), Checkpoint(path)
    np.testing.assert_allclose(model(IDS, last_only=False), logits, rtol=1e-4, atol=1e-5)
    assert file.config == HybridConfig.from_settings(file.settings)
    tokenizer = read_tokenizer(file)
    assert tokenizer.eos_id == 259
    ids = tokenizer.apply_chat("é")
    assert tokenizer.decode(ids) == "<|user|>é<|end|><|assistant|>"


@pytest.mark.slow
@pytest.mark.cross_backend
def test_transformers_reads_it(saved):
    transformers = pytest.importorskip("transformers", reason="needs the extra of this name")
    torch = pytest.importorskip("torch", reason="needs the extra of this name")
    path, logits = saved
    peer = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        theirs = peer(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.encode("<|user|>aé") == [257, *read_tokenizer(Checkpoint(path)).encode("aé")]
    assert tokenizer.eos_token == END
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Hi<|end|><|assistant|>"


def test_the_corpus():
    known = dict(pairs())
    assert len(known) > 100
    assert known["len"] == "Return the number of items in a container."
    assert known["zen 3"] == "Simple is better than complex."
    assert all(0 < len(answer) <= LONGEST and answer.isascii() for answer in known.values())
    deck = shuffled(pairs(), random.Random(0))
    assert {next(deck) for _ in known} == set(pairs())
    turns = conversation(deck, 200)
    length = sum(len(turn.question) + len(turn.answer) for turn in turns)
    assert 200 <= length < 200 + 2 * LONGEST
