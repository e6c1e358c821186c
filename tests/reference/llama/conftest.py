"""Models for the tests: a tiny random one, and SmolLM2-135M-Instruct where it is installed."""

import json
from pathlib import Path

import numpy as np
import pytest

from kvcache.reference.errors import ModelFileError

GOLDEN = Path(__file__).parents[2] / "data" / "smollm2_greedy.json"
HIDDEN, WIDE, HEADS, KV_HEADS, DIM, LAYERS, VOCAB = 32, 64, 4, 2, 8, 2, 64
METADATA = {
    "llama.vocab_size": VOCAB,
    "llama.context_length": 256,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDE,
    "llama.block_count": LAYERS,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100.0,
    "llama.rope.dimension_count": DIM,
}


def tiny_tensors(seed=0):
    """Random weights of a llama model by their names in a GGUF file."""
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return rng.normal(scale=shape[-1] ** -0.5, size=shape).astype(np.float32)

    tensors = {"token_embd.weight": matrix(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        tensors |= {
            f"blk.{i}.attn_norm.weight": 1 + matrix(HIDDEN),
            f"blk.{i}.attn_q.weight": 3 * matrix(HEADS * DIM, HIDDEN),
            f"blk.{i}.attn_k.weight": 3 * matrix(KV_HEADS * DIM, HIDDEN),
            f"blk.{i}.attn_v.weight": matrix(KV_HEADS * DIM, HIDDEN),
            f"blk.{i}.attn_output.weight": matrix(HIDDEN, HEADS * DIM),
            f"blk.{i}.ffn_norm.weight": 1 + matrix(HIDDEN),
            f"blk.{i}.ffn_gate.weight": matrix(WIDE, HIDDEN),
            f"blk.{i}.ffn_up.weight": matrix(WIDE, HIDDEN),
            f"blk.{i}.ffn_down.weight": matrix(HIDDEN, WIDE),
        }
    return tensors | {"output_norm.weight": 1 + matrix(HIDDEN)}


@pytest.fixture(scope="session")
def write_gguf(tmp_path_factory):
    """Writes a tiny GGUF file; arguments replace metadata and tensors, None removes them."""
    import gguf

    def write(metadata=(), tensors=(), architecture="llama", quantise=None):
        path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in (METADATA | dict(metadata)).items():
            if value is not None:
                _add(writer, key, value)
        for name, array in (tiny_tensors() | dict(tensors)).items():
            if array is not None:
                kind = quantise if quantise and array.ndim == 2 else None
                data = gguf.quants.quantize(array, kind) if kind else array
                writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add(writer, key, value):
    kinds = {int: "uint32", float: "float32", str: "string", bool: "bool", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


@pytest.fixture(scope="session")
def tiny_file(write_gguf):
    """A tiny llama model with tied embeddings."""
    from kvcache.reference.llama.gguf import open_gguf

    return open_gguf(write_gguf())


@pytest.fixture(scope="session")
def tiny(tiny_file, backend):
    """The tiny model on every backend."""
    from kvcache.reference.llama.model import Llama

    return Llama.from_gguf(tiny_file, backend)


class Windowed:
    """A model that attends to so many tokens at most, for generation."""

    def __init__(self, model, window):
        self.model, self.backend, self.window = model, model.backend, window

    def __call__(self, ids, caches):
        return self.model(ids, caches, window=self.window)


@pytest.fixture(scope="session")
def smollm2_file():
    """SmolLM2-135M-Instruct, opened."""
    from kvcache.reference.llama.gguf import default_model_path, open_gguf

    try:
        return open_gguf(default_model_path())
    except ModelFileError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_weights(smollm2_file):
    """Its weights as NumPy arrays: dequantised once, whatever the number of backends."""
    from kvcache.reference.llama.weights import load_weights

    return load_weights(smollm2_file, np.asarray)


@pytest.fixture(scope="session")
def smollm2(smollm2_file, smollm2_weights, backend):
    """The real model on every backend."""
    from kvcache.reference.llama.model import Llama

    put = backend.from_host
    embedding, layers, norm, head, frequencies = smollm2_weights
    assert head is embedding
    tied = put(embedding)
    layers = tuple(type(layer)(*map(put, layer)) for layer in layers)
    weights = type(smollm2_weights)(tied, layers, put(norm), tied, frequencies)
    return Llama(smollm2_file.config, weights, backend)


@pytest.fixture(scope="session", params=range(5), ids=lambda i: f"prompt{i}")
def recorded(request):
    """A prompt with the 64 tokens that the model is known to continue it with."""
    return json.loads(GOLDEN.read_text())[request.param] | {"number": request.param}


@pytest.fixture(scope="session")
def story():
    """The token ids of a text without repetitions: 38 of them."""
    text = "2 7 1 8 2 8 1 8 2 8 4 5 9 0 4 5 2 3 5 3 6 0 2 8 7 4 7 1 3 5 2 6 6"
    return [504, 3575, 282, 4649, 314, *(32 + int(digit) for digit in text.split())]
