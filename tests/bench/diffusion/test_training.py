"""Training teaches something, always the same, and is told what it cannot teach."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

import torch

import kvcache
from kvcache.bench.diffusion import training
from kvcache.reference.dit.model import DiT, DiTConfig
from kvcache.reference.dit.toy_shapes import distance

pytestmark = pytest.mark.one_backend(name="torch")
SMALL = DiTConfig(tokens=12, width=16, heads=2, blocks=2)
TORCH = kvcache.get_backend("torch:cpu")


@pytest.fixture(scope="module")
def trained():
    """A small model after 30 iterations, and what was said on the way."""
    said = []
    model = training.train(SMALL, 30, seed=3, progress=lambda *args: said.append(args))
    return model, said


def loss(model):
    """On examples that training has not seen."""
    examples = training.draw_examples(np.random.default_rng(99), SMALL, TORCH, 64)
    with torch.no_grad():
        return training.flow_loss(model, examples).item()


def test_thirty_iterations_help(trained):
    model, _ = trained
    assert loss(model) < 0.8 * loss(DiT.random(SMALL, TORCH, seed=3))


def test_the_same_seed_is_the_same_model(trained):
    again = training.train(SMALL, 30, seed=3)
    other = training.train(SMALL, 1, seed=4)
    for name, weight in trained[0].weights.items():
        assert torch.equal(weight, again.weights[name]), name
        assert not torch.equal(weight, other.weights[name]), name


def test_a_gradient_is_of_one_batch(monkeypatch):
    original, seen = training.flow_loss, []

    def flow_loss(model, examples):
        seen.append([name for name, weight in model.weights.items() if weight.grad is not None])
        return original(model, examples)

    monkeypatch.setattr(training, "flow_loss", flow_loss)
    training.train(SMALL, 3)
    assert seen == [[], [], []]


def test_the_model_is_free_of_autograd(trained):
    model, _ = trained
    assert model.backend.name == "torch"
    assert not any(weight.requires_grad for weight in model.weights.values())
    assert model.to_backend(kvcache.get_backend("numpy")).config == SMALL


def test_progress(trained):
    _, said = trained
    assert [args[:2] for args in said] == [(i, 30) for i in range(1, 31)]
    losses = [float(text.removeprefix("loss ")) for _, _, text in said]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_examples_lie_between_data_and_noise():
    examples = training.draw_examples(np.random.default_rng(0), SMALL, TORCH, 2000)
    x, t, prompt, velocity = map(TORCH.to_host, examples)
    assert (x.shape, t.shape, prompt.shape) == ((2000, 12, 2), (2000,), (2000, 4))
    assert {a.dtype.name for a in (x, t, velocity)} == {"float32"}
    assert 0 < t.min() < 0.1 < 0.9 < t.max() < 1
    data = x - t[:, None, None] * velocity
    noise = data + velocity
    assert noise.std() == pytest.approx(1, abs=0.02)
    named = prompt[:, 0] > 0
    assert np.mean(named) == pytest.approx(0.9, abs=0.02)
    assert distance(data[named], prompt[named, 0]).max() < 0.08
    assert set(prompt.flat) == set(range(8))


def test_learning_rate_rises_and_falls():
    rates = [training._learning_rate(i, 100) for i in range(100)]
    most = training.LEARNING_RATE
    assert rates[0] < 0.2 * most < 0.9 * most < max(rates) <= most
    assert 0 < rates[-1] < 0.01 * most


@pytest.mark.parametrize(
    ("config", "iterations", "says"),
    [
        (SMALL, 0, "iterations >= 1; got 0"),
        (DiTConfig(channels=3), 1, "channels=2 and vocabulary > 7; got 3 and 8"),
        (DiTConfig(vocabulary=7), 1, "got 2 and 7"),
        (DiTConfig(tokens=7), 1, "at least 8 points"),
    ],
)
def test_what_cannot_be_learnt(config, iterations, says):
    with pytest.raises(ValueError, match=says):
        training.train(config, iterations)
