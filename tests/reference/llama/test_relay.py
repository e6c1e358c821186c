"""One running generation, handed from framework to framework, says what it says on one."""

import itertools

import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from typer.testing import CliRunner

import kvcache
from kvcache.backends import transfer
from kvcache.cli import app
from kvcache.reference.generate import generate, relay
from kvcache.reference.llama.model import Llama

pytestmark = pytest.mark.cross_backend
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
KINDS = {"kv": {}, "rotating": {"kind": "rotating", "max_size": 9, "keep": 2}}


@pytest.fixture(scope="module")
def names():
    """Those of all backends that are installed, NumPy first and last: one hand-over at least."""
    infos = kvcache.available_backends()
    others = [name for name in ("torch", "jax", "mlx") if infos[name].installed]
    return ["numpy", *others, "numpy"]


@pytest.fixture(scope="module")
def models(tiny_file, names):
    return [Llama.from_gguf(tiny_file, kvcache.get_backend(name)) for name in names]


def relayed(models, count, options=(), **rest):
    caches = list(models[0].make_caches(**dict(options)))
    return list(relay(models, PROMPT, caches, count, **rest)), caches


def alone(model, count, options=(), **rest):
    caches = model.make_caches(**dict(options))
    return list(generate(model, PROMPT, caches, count, **rest))


@pytest.mark.parametrize("every", [1, 4, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_says_the_same(models, kind, every):
    went = []
    tokens, caches = relayed(
        models, 18, KINDS[kind], every=every, note=went.append, prefill_chunk=4
    )
    assert tokens == alone(models[0], 18, KINDS[kind])
    turns = -(-18 // every)
    assert went == list(itertools.islice(itertools.cycle(models), turns))[1:]
    assert {cache.backend for cache in caches} == {([models[0], *went])[-1].backend}
    assert {cache.offset for cache in caches} == {len(PROMPT) + 17}


def test_nothing_is_computed_again(models):
    fed = []

    class Counting:
        def __init__(self, model):
            self.model, self.backend, self.make_caches = model, model.backend, model.make_caches

        def __call__(self, ids, *args, **kwargs):
            fed.append(len(ids[0]))
            return self.model(ids, *args, **kwargs)

    relayed([Counting(model) for model in models], 8, every=3)
    assert fed == [len(PROMPT), *[1] * 7]


@pytest.mark.parametrize("at", [3, 4, 5])
def test_the_end_token_ends_it(models, at):
    """Before a hand-over, when it is due, and after it."""
    tokens = alone(models[0], 12)
    end = next(i for i in range(at, 12) if tokens[i] not in tokens[:i])
    relayed_tokens, _ = relayed(models, 12, every=end - at + 4, eos_id=tokens[end])
    assert relayed_tokens == tokens[:end]


@pytest.mark.parametrize("count", [0, 4, 8])
def test_the_last_token_is_not_handed_on(models, count):
    went = []
    relayed(models, count, every=4, note=went.append)
    assert len(went) == max(0, count // 4 - 1)


def test_no_relay(models):
    for runners, every in (([], 4), (models, 0)):
        with pytest.raises(ValueError, match=f"got {len(runners)} and {every}"):
            next(relay(runners, PROMPT, [], 4, every=every))
    with pytest.raises(ValueError, match="max_tokens must be >= 0; got -1"):
        relayed(models, -1)


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *arguments], env={"COLUMNS": "300"})


@pytest.mark.model
def test_a_real_model_on_the_command_line(smollm2_file, smollm2_weights, monkeypatch, names):
    """Twelve tokens over every framework, each of which is given the weights once."""
    loaded = []

    def load(file, backend, progress):
        loaded.append(backend.name)

        def put(array):
            return transfer(array, kvcache.get_backend("numpy"), backend)

        embedding, layers, norm, _, frequencies = smollm2_weights
        head, layers = put(embedding), tuple(type(layer)(*map(put, layer)) for layer in layers)
        weights = type(smollm2_weights)(head, layers, put(norm), head, frequencies)
        return Llama(file.config, weights, backend)

    monkeypatch.setattr(Llama, "from_gguf", load)
    prompt = ["The capital of France is", "-n", "12", "--cache", "rotating", "--max-size", "8"]
    one = run(*prompt)
    loaded.clear()
    many = run(*prompt, "--relay", ",".join(names), "--relay-every", "2")
    assert one.exit_code == many.exit_code == 0
    assert many.stdout == one.stdout
    assert loaded == names[:-1]
    assert many.stderr.count("[30 caches of") == 5
    second = kvcache.get_backend(names[1]).spec
    assert f"[30 caches of 6 tokens handed to {second}]" in many.stderr
    assert ", ".join(kvcache.get_backend(name).spec for name in names) in many.stderr
