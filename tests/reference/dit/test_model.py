"""The diffusion transformer against a slow one that shares nothing with it, on every backend."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

import kvcache
from kvcache.errors import ShapeError
from kvcache.reference.dit.model import DiT, DiTConfig, euler, guided, schedule
from kvcache.reference.errors import ModelFileError

CONFIG = DiTConfig(
    channels=3, tokens=10, vocabulary=5, text_tokens=2, width=12, heads=3, blocks=3, mlp_ratio=2
)
RNG = np.random.default_rng(1)
X = RNG.normal(size=(4, 10, 3)).astype(np.float32)
T = np.array([0.0, 0.3, 0.7, 1.0], np.float32)
PROMPT = np.array([[1, 2], [0, 0], [4, 4], [3, 0]], np.int32)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def oracle(weights, x, t, prompt):
    """Velocity of one sample, [tokens, channels], in float64, head by head and row by row."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def modulated(rows, shift, scale):
        normed = [(row - row.mean()) / np.sqrt(row.var() + 1e-6) for row in rows]
        return np.stack(normed) * (1 + scale) + shift

    angles = t * 16.0 ** (np.arange(6) / 5)
    pooled = w["prompts"][prompt].mean(0)
    c = np.concatenate([np.sin(angles), np.cos(angles)]) + pooled
    c = silu(linear("condition.down", silu(linear("condition.up", c))))
    streams = {
        "hidden": linear("input", x) + w["positions"],
        "text": w["prompts"][prompt] + w["text_positions"],
    }
    for i in range(CONFIG.blocks):
        parts, qkv = {}, []
        for name, rows in streams.items():
            parts[name] = np.split(linear(f"blocks.{i}.{name}.modulation", c), 6)
            qkv.append(linear(f"blocks.{i}.{name}.qkv", modulated(rows, *parts[name][:2])))
        q, k, v = np.split(np.concatenate(qkv), 3, axis=1)
        heads = []
        for head in np.split(np.arange(CONFIG.width), CONFIG.heads):
            scores = np.exp(q[:, head] @ k[:, head].T / math.sqrt(len(head)))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, head])
        halves = np.split(np.concatenate(heads, 1), [CONFIG.tokens])
        for (name, rows), attended in zip(streams.items(), halves, strict=True):
            _, _, gate, shift, scale, mlp_gate = parts[name]
            half = rows + gate * linear(f"blocks.{i}.{name}.out", attended)
            wide = silu(linear(f"blocks.{i}.{name}.up", modulated(half, shift, scale)))
            streams[name] = half + mlp_gate * linear(f"blocks.{i}.{name}.down", wide)
    shift, scale = np.split(linear("final.modulation", c), 2)
    return linear("final.output", modulated(streams["hidden"], shift, scale))


@pytest.fixture(scope="module")
def tiny_numpy():
    return DiT.random(CONFIG, kvcache.get_backend("numpy"))


@pytest.fixture(scope="module")
def expected(tiny_numpy):
    return np.stack([oracle(tiny_numpy.weights, *row) for row in zip(X, T, PROMPT, strict=True)])


@pytest.fixture(scope="module")
def dit(backend):
    return DiT.random(CONFIG, backend)


@pytest.fixture
def inputs(backend):
    """Samples, times and prompts on the backend."""
    return [backend.from_host(array) for array in (X, T, PROMPT)]


def changed(model, name, factor=1.5):
    """A copy of a model on NumPy with one weight scaled."""
    return DiT(model.config, model.weights | {name: factor * model.weights[name]}, model.backend)


# What it computes.


def test_velocity(dit, inputs, expected):
    velocity = dit.backend.to_host(dit(*inputs))
    assert velocity.dtype == np.float32
    np.testing.assert_allclose(velocity, expected, **CLOSE)
    assert expected.std() > 0.5


def test_compiled(dit, inputs, expected):
    compiled = dit.backend.compile(dit)
    np.testing.assert_allclose(dit.backend.to_host(compiled(*inputs)), expected, **CLOSE)


def test_only_standard_array_functions(expected):
    pytest.importorskip("array_api_strict")
    backend = kvcache.get_backend("array_api:array_api_strict")
    velocity = DiT.random(CONFIG, backend)(*map(backend.from_host, (X, T, PROMPT)))
    np.testing.assert_allclose(backend.to_host(velocity), expected, **CLOSE)


def test_in_parts(dit, inputs):
    x, t, prompt = inputs
    host = dit.backend.to_host
    condition, streams = dit.condition(t, prompt), dit.embed(x, prompt)
    assert [host(a).shape for a in (condition, *streams)] == [(4, 12), (4, 10, 12), (4, 2, 12)]
    for index in range(CONFIG.blocks):
        streams = dit.block(index, streams, condition)
        assert [host(a).shape for a in streams] == [(4, 10, 12), (4, 2, 12)]
    parts = host(dit.finish(streams[0], condition))
    assert parts.tobytes() == host(dit(x, t, prompt)).tobytes()


def test_one_time_for_all(dit, inputs):
    x, _, prompt = inputs
    host, put = dit.backend.to_host, dit.backend.from_host
    every = host(dit(x, put(np.full(4, 0.3, np.float32)), prompt))
    for time in (0.3, np.float64(0.3), put(np.array(0.3, np.float32))):
        one = host(dit(x, time, prompt))
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, every, **CLOSE)


def test_modulated_input_is_what_the_first_block_attends_to(dit, inputs):
    x, t, prompt = inputs
    host = dit.backend.to_host
    condition, streams = dit.condition(t, prompt), dit.embed(x, prompt)
    c, hidden = host(condition).astype(float), host(streams[0]).astype(float)
    name = "blocks.0.hidden.modulation"
    vectors = c @ host(dit.weights[f"{name}.weight"]) + host(dit.weights[f"{name}.bias"])
    shift, scale = (part[:, None] for part in np.split(vectors, 6, axis=1)[:2])
    normed = hidden - hidden.mean(-1, keepdims=True)
    normed /= np.sqrt(normed.var(-1, keepdims=True) + 1e-6)
    signal = host(dit.modulated_input(streams, condition))
    assert signal.dtype == np.float32
    np.testing.assert_allclose(signal, normed * (1 + scale) + shift, **CLOSE)


def test_entries_of_a_batch_are_independent(dit, inputs):
    put, host = dit.backend.from_host, dit.backend.to_host
    together = host(dit(*inputs))
    for i in range(4):
        alone = dit(*(put(array[i : i + 1]) for array in (X, T, PROMPT)))
        np.testing.assert_allclose(host(alone)[0], together[i], **CLOSE)


@pytest.mark.one_backend(name="torch")
def test_torch_differentiates_through_it(tiny_numpy):
    pytest.importorskip("torch")
    model = tiny_numpy.to_backend(kvcache.get_backend("torch:cpu"))
    weights = {name: array.requires_grad_() for name, array in model.weights.items()}
    velocity = model(*map(model.backend.from_host, (X, T, PROMPT)))
    (velocity**2).sum().backward()
    without = {name for name, weight in weights.items() if weight.grad is None}
    # Nobody reads what the last block makes of the text.
    unread = ("out", "up", "down")
    last = f"blocks.{CONFIG.blocks - 1}.text"
    assert without == {f"{last}.{part}.{kind}" for part in unread for kind in ("weight", "bias")}
    name, at = "blocks.1.text.qkv.weight", (3, 5)
    nudge = np.zeros_like(tiny_numpy.weights[name])
    nudge[at] = 1e-2
    sums = []
    for sign in (1, -1):
        moved = {**tiny_numpy.weights, name: tiny_numpy.weights[name] + sign * nudge}
        moved = DiT(CONFIG, moved, tiny_numpy.backend)(X, T, PROMPT)
        sums.append((moved.astype(np.float64) ** 2).sum())
    assert weights[name].grad[at].item() == pytest.approx((sums[0] - sums[1]) / 2e-2, rel=0.02)


# Random weights.


def test_random_weights_are_the_same_bits_everywhere(dit, tiny_numpy):
    assert dit.weights.keys() == tiny_numpy.weights.keys()
    for name, weight in tiny_numpy.weights.items():
        drawn = dit.backend.to_host(dit.weights[name])
        assert drawn.dtype == np.float32
        assert drawn.tobytes() == weight.tobytes(), name
    assert float(tiny_numpy.weights["prompts"][0, 0]) == pytest.approx(0.12573022)


def test_another_seed_is_another_model(tiny_numpy):
    other = DiT.random(CONFIG, tiny_numpy.backend, seed=1)
    for name, weight in tiny_numpy.weights.items():
        assert np.abs(weight - other.weights[name]).min() > 0, name


@pytest.mark.parametrize("index", range(CONFIG.blocks))
@pytest.mark.parametrize("part", ["hidden.out", "hidden.down", "hidden.qkv", "text.qkv"])
def test_every_block_matters(tiny_numpy, index, part):
    before = tiny_numpy(X, T, PROMPT)
    after = changed(tiny_numpy, f"blocks.{index}.{part}.weight")(X, T, PROMPT)
    assert np.sqrt(np.mean((after - before) ** 2)) > 0.02


@pytest.mark.parametrize("argument", range(3))
def test_every_argument_matters(tiny_numpy, argument):
    arguments = [X, T, PROMPT]
    before = tiny_numpy(*arguments)
    arguments[argument] = [X + 0.1, (T + 0.5) % 1, (PROMPT + 1) % 5][argument]
    assert (np.abs(tiny_numpy(*arguments) - before).max((1, 2)) > 0.02).all()


def test_velocity_is_smooth_in_time():
    model = DiT.random(DiTConfig(blocks=2), kvcache.get_backend("numpy"))
    times = np.linspace(0, 1, 101, dtype=np.float32)
    x = np.repeat(np.random.default_rng(0).normal(size=(1, 32, 2)).astype(np.float32), 101, 0)
    velocity = model(x, times, np.ones((101, 4), np.int32))
    steps = np.sqrt(np.mean(np.diff(velocity, axis=0) ** 2, axis=(1, 2)))
    assert 0.001 < steps.max() < 0.1 * velocity.std()


# To other backends, and files.


def test_to_backend_and_back(dit, inputs, expected, tiny_numpy):
    moved = tiny_numpy.to_backend(dit.backend)
    np.testing.assert_allclose(dit.backend.to_host(moved(*inputs)), expected, **CLOSE)
    back = moved.to_backend(tiny_numpy.backend)
    for name, weight in tiny_numpy.weights.items():
        assert back.weights[name].tobytes() == weight.tobytes()
        assert not np.shares_memory(back.weights[name], weight)


def test_save_and_load(dit, tiny_numpy, tmp_path):
    dit.save(tmp_path / "model.safetensors")
    loaded = DiT.load(tmp_path / "model.safetensors", tiny_numpy.backend)
    assert loaded.config == CONFIG
    for name, weight in tiny_numpy.weights.items():
        assert loaded.weights[name].tobytes() == weight.tobytes()
    again = DiT.load(tmp_path / "model.safetensors", dit.backend)
    assert dit.backend.owns(again.weights["positions"])


@pytest.fixture
def rewritten(tiny_numpy, tmp_path):
    """The path of a saved model whose tensors or sizes are others."""

    def rewrite(weights=None, metadata=None):
        path = tmp_path / "other.safetensors"
        tensors = tiny_numpy.weights if weights is None else weights
        safetensors.numpy.save_file(tensors, path, metadata)
        return path

    return rewrite


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (None, r"has 'kvcache.dit' in its metadata; .* has \[\]. Load files that DiT.save wrote"),
        ({"kvcache": "{}"}, r"has \['kvcache'\]"),
        ({"kvcache.dit": "{"}, "says nothing of the model's sizes"),
        ({"kvcache.dit": "[]"}, "says nothing of the model's sizes"),
        ({"kvcache.dit": '{"width": 0}'}, "an int >= 1; got width=0"),
        ({"kvcache.dit": '{"depth": 1}'}, "depth"),
        ({"kvcache.dit": "{}"}, "does not hold what its metadata says: .* weights do not fit"),
    ],
)
def test_foreign_files(rewritten, metadata, says):
    with pytest.raises(ModelFileError, match=says):
        DiT.load(rewritten(metadata=metadata), kvcache.get_backend("numpy"))


def test_files_with_other_weights(rewritten, tiny_numpy):
    sizes = {"kvcache.dit": json.dumps(vars(CONFIG))}
    DiT.load(rewritten(metadata=sizes), tiny_numpy.backend)
    fewer = {name: w for name, w in tiny_numpy.weights.items() if name != "positions"}
    with pytest.raises(ModelFileError, match=r"'positions' must be \(10, 12\); got None"):
        DiT.load(rewritten(fewer, sizes), tiny_numpy.backend)
    halves = tiny_numpy.weights | {"positions": tiny_numpy.weights["positions"].astype("float64")}
    with pytest.raises(ModelFileError, match=r"float32; .*'positions' is float64"):
        DiT.load(rewritten(halves, sizes), tiny_numpy.backend)


def test_files_that_are_none(tmp_path):
    backend = kvcache.get_backend("numpy")
    (tmp_path / "text").write_bytes(b"no model at all")
    for path in ("missing", "text", "."):
        with pytest.raises(ModelFileError, match="is not a whole safetensors file"):
            DiT.load(tmp_path / path, backend)


# Arguments that do not fit.


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"blocks": 0}, "every size must be an int >= 1; got blocks=0"),
        ({"width": 64.0}, r"got width=64\.0"),
        ({"tokens": True}, "got tokens=True"),
        ({"vocabulary": 1}, "vocabulary must be >= 2"),
        ({"width": 65, "heads": 4}, "multiple of heads; got 65 for 4 heads. .* above is 68"),
        ({"width": 9, "heads": 3}, "must be even .* got 9 for 3 heads. .* above is 12"),
    ],
)
def test_bad_sizes(sizes, says):
    with pytest.raises(ValueError, match=says):
        DiTConfig(**sizes)


def test_weights_of_another_size(tiny_numpy):
    for config, says in [
        (replace(CONFIG, tokens=11), r"1 weights .*'positions' must be \(11, 12\); got \(10, 12\)"),
        (replace(CONFIG, blocks=2), r"20 weights .*'blocks.2.* must be None; got \("),
    ]:
        with pytest.raises(ShapeError, match=says):
            DiT(config, tiny_numpy.weights, tiny_numpy.backend)


@pytest.mark.parametrize(
    ("x", "prompt", "says"),
    [
        (X[:, :9], PROMPT, r"a sample of this model is \[B, 10, 3\]; got \(4, 9, 3\)"),
        (X[0], PROMPT, r"got \(10, 3\)"),
        (X, PROMPT[:, :1], r"a prompt of this model is \[B, 2\]; got \(4, 1\)"),
        (X, PROMPT[0], r"got \(2,\)"),
    ],
)
def test_bad_shapes(tiny_numpy, x, prompt, says):
    with pytest.raises(ShapeError, match=says):
        tiny_numpy(x, T, prompt)


# Samplers.


def test_schedule_ends():
    assert schedule(4) == [1, 0.75, 0.5, 0.25, 0]
    for steps in (1, 2, 28):
        for shift in (0.3, 1.0, 3.0):
            times = schedule(steps, shift)
            assert len(times) == steps + 1
            assert (times[0], times[-1]) == (1, 0)
            assert (np.diff(times) < 0).all()


def test_shift_spends_steps_near_the_noise():
    assert schedule(2, 3.0)[1] == pytest.approx(0.75)
    assert schedule(2, 1 / 3)[1] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("steps", "shift", "says"),
    [
        (0, 1.0, "steps >= 1; got 0"),
        (4, 0.0, r"positive and finite; got 0\.0"),
        (4, math.inf, "got inf"),
        (4, math.nan, "got nan"),
    ],
)
def test_bad_schedules(steps, shift, says):
    with pytest.raises(ValueError, match=says):
        schedule(steps, shift)


def test_euler_is_exact_along_a_straight_line(backend):
    noise, direction = (backend.from_host(array) for array in (X, X[::-1] * 2))
    seen = []

    def velocity(step, time, x):
        seen.append((step, time))
        return direction

    times = np.array([1.0, 0.5, 0.25, -0.25])
    end = backend.to_host(euler(noise, times, velocity))
    assert end.dtype == np.float32
    np.testing.assert_allclose(end, X - 1.25 * 2 * X[::-1], rtol=1e-6, atol=1e-6)
    assert seen == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert all(type(time) is float for _, time in seen)


def test_euler_converges_with_the_first_order():
    # dx/dt = x + t from 1 to 0: x = (x1 + 2) * exp(t - 1) - t - 1.
    noise = np.linspace(-1, 1, 5)
    exact = (noise + 2) * math.exp(-1) - 1
    errors = [
        np.abs(euler(noise, schedule(steps), lambda _, t, x: x + t) - exact).max()
        for steps in (64, 128, 256)
    ]
    ratios = np.divide(errors[:-1], errors[1:])
    np.testing.assert_allclose(ratios, 2, rtol=0.03)


@pytest.mark.parametrize("times", [[], [1.0], [1.0, 1.0], [0.0, 1.0], [1.0, math.nan]])
def test_times_must_fall(times):
    with pytest.raises(ValueError, match="two or more and strictly decreasing"):
        euler(X, times, lambda step, time, x: x)


@pytest.mark.one_backend(name="jax")
def test_a_whole_sample_in_one_jax_program(tiny_numpy):
    jax = pytest.importorskip("jax")
    model = tiny_numpy.to_backend(kvcache.get_backend("jax:cpu"))
    noise, prompt = model.backend.from_host(X), model.backend.from_host(PROMPT)

    def body(x, time):
        return x - 0.25 * model(x, time, prompt), None

    times = np.array([1, 0.75, 0.5, 0.25], np.float32)
    end, _ = jax.jit(lambda x: jax.lax.scan(body, x, times))(noise)
    stepped = euler(X, schedule(4), lambda _, t, x: tiny_numpy(x, t, PROMPT))
    np.testing.assert_allclose(end, stepped, rtol=1e-3, atol=1e-4)


def test_guided(backend):
    cond, uncond = (backend.from_host(array) for array in (X, X[::-1].copy()))
    for scale in (0.0, 1.0, 2.5, np.float64(2.5)):
        guide = backend.to_host(guided(cond, uncond, scale))
        assert guide.dtype == np.float32
        np.testing.assert_allclose(guide, scale * X + (1 - scale) * X[::-1], atol=1e-5)
