"""Recipes inside diffusers' own transformers, tiny and random, next to diffusers' own caches."""

import subprocess
import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from kvcache import NotSupportedError, StepOrderError, UnknownStreamError  # noqa: E402
from kvcache.adapters.diffusers.attach import attach  # noqa: E402
from kvcache.adapters.diffusers.blocks import aligned  # noqa: E402
from kvcache.backends import get_backend  # noqa: E402
from kvcache.diffusion import (  # noqa: E402
    TIMESTEP,
    Accumulated,
    BlockRange,
    HoldOutput,
    HoldResidual,
    Interval,
    Limits,
    Magnitude,
    Recipe,
    StepMask,
    Taylor,
    Threshold,
)

STEPS = 8
UNLIMITED = Limits(max_consecutive_skips=1000)
JUST_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0)).item()
"""A timestep of its own, at which a network computes what it does at 0.5."""
SCOPES = [None, BlockRange(1), BlockRange(1, 1), BlockRange(0), BlockRange(3, 0)]
SCOPE_NAMES = ["whole", "F1B0", "F1B1", "F0B0", "F3B0"]


class Flux:
    """FLUX: two blocks of two streams, then two of one."""

    shape = (1, 16, 8)
    blocks = 4

    def __init__(self):
        torch.manual_seed(0)
        self.model = diffusers.FluxTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        ).eval()
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        self.inputs = {
            "encoder_hidden_states": torch.randn(1, 4, 32),
            "pooled_projections": torch.randn(1, 16),
            "img_ids": ids,
            "txt_ids": torch.zeros(4, 3),
        }
        self.scale = 1

    def __call__(self, x, t, **more):
        timestep = torch.tensor([t * self.scale])
        inputs = {**self.inputs, "return_dict": False, **more}
        return self.model(hidden_states=x, timestep=timestep, **inputs)[0]


class SD3(Flux):
    """Stable Diffusion 3: four blocks, the last of which drops the text."""

    shape = (1, 4, 8, 8)

    def __init__(self):
        torch.manual_seed(0)
        self.model = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
        ).eval()
        self.inputs = {
            "encoder_hidden_states": torch.randn(1, 5, 32),
            "pooled_projections": torch.randn(1, 16),
        }
        self.scale = 1000


class Flux2(Flux):
    """FLUX.2: text and image become one sequence halfway."""

    def __init__(self):
        super().__init__()
        self.model = diffusers.Flux2Transformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ).eval()
        ids = torch.cartesian_prod(*[torch.arange(float(n)) for n in (1, 4, 4, 1)])
        texts = torch.cartesian_prod(*[torch.arange(float(n)) for n in (1, 1, 1, 4)])
        encoder = self.inputs["encoder_hidden_states"]
        self.inputs = {"encoder_hidden_states": encoder, "img_ids": ids, "txt_ids": texts}


class Wan(Flux):
    """Wan: its blocks read the text and give on the video alone."""

    shape = (1, 4, 2, 4, 4)

    def __init__(self):
        torch.manual_seed(0)
        self.model = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=4,
            rope_max_seq_len=32,
        ).eval()
        self.inputs = {"encoder_hidden_states": torch.randn(1, 5, 16)}
        self.scale = 1000


@pytest.fixture(params=[Flux, SD3], ids=lambda kind: kind.__name__)
def net(request):
    return request.param()


@pytest.fixture
def flux():
    return Flux()


def denoise(net, steps=STEPS, contexts=(None,), context=lambda step: {}, **inputs):
    """Every velocity of an Euler loop from the same noise, and where it ends; by context."""
    times = torch.linspace(1, 0, steps + 1)
    noise = torch.randn(net.shape, generator=torch.Generator().manual_seed(1))
    found = {name: [torch.empty(0)] * (not steps) for name in contexts}
    x = noise
    with torch.no_grad():
        for step in range(steps):
            dt = times[step + 1] - times[step]
            for name in contexts:
                inside = net.model.cache_context(name, **context(step)) if name else nullcontext()
                with inside:
                    found[name].append(net(x, times[step].item(), **inputs))
            x = x + dt * sum(found[name][-1] for name in contexts) / len(contexts)
    return [*(torch.stack(found[name]) for name in contexts), x]


def decisions(caching, stream=None):
    return [r.computed for r in caching.cache.stats.steps if stream in (None, r.stream)]


@contextmanager
def counted(model, index):
    """How often the block at `index` of a FLUX computes, whoever keeps it from doing so."""
    calls = []
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    hook = blocks[index].attn.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


# Nothing is skipped: nothing changes.


@pytest.mark.parametrize("scope", SCOPES, ids=SCOPE_NAMES)
@pytest.mark.parametrize(
    "policy",
    [
        Threshold(0),
        Accumulated(0),
        Interval(1),
        StepMask([True] * STEPS),
        Accumulated(0, (1, 0), TIMESTEP),
    ],
    ids=["threshold", "accumulated", "interval", "mask", "timestep"],
)
def test_without_a_skip_results_are_the_same_bit_for_bit(net, scope, policy):
    expected = denoise(net)
    with attach(net.model, Recipe(policy, HoldOutput()), scope=scope) as caching:
        found = denoise(net)
        assert decisions(caching) == [True] * STEPS
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("scope", SCOPES, ids=SCOPE_NAMES)
@pytest.mark.parametrize("predictor", [HoldOutput(), HoldResidual(), Taylor(2), Taylor(1, True)])
@pytest.mark.parametrize("kind", [Flux, SD3, Flux2, Wan])
def test_a_skipped_step_of_the_same_input_gives_the_same(kind, scope, predictor):
    net = kind()
    if kind is Flux2 and scope == BlockRange(3, 0):
        scope = BlockRange(2)
    x = torch.randn(net.shape)
    with attach(net.model, Recipe(Interval(2), predictor), scope=scope), torch.no_grad():
        computed, skipped = net(x, 0.5), net(x, JUST_BELOW_HALF)
    torch.testing.assert_close(skipped, computed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES, ids=SCOPE_NAMES)
def test_skipped_steps_are_skipped_and_differ(net, scope):
    expected = denoise(net)[-1]
    ran = []
    module = net.model.transformer_blocks[1].attn
    module.register_forward_hook(lambda *_: ran.append(1))
    with attach(net.model, Recipe(Interval(2), HoldOutput()), scope=scope) as caching:
        found = denoise(net)[-1]
        assert decisions(caching) == [True, False] * (STEPS // 2)
    assert len(ran) == (STEPS if scope == BlockRange(3, 0) else STEPS // 2)
    error = (found - expected).norm() / expected.norm()
    assert 1e-6 < error < 0.2


def test_extrapolation_beats_holding(net):
    expected = denoise(net)[-1]
    errors = []
    for order in range(2):
        with attach(net.model, Recipe(Interval(2), Taylor(order), Limits(warmup=2)), scope=None):
            errors.append((denoise(net)[-1] - expected).norm().item())
    assert errors[0] > 1.2 * errors[1]


def test_what_controlnet_adds_is_added_once(flux):
    added = [torch.randn(1, 16, 32), torch.randn(1, 16, 32)]
    more = {"controlnet_block_samples": added, "controlnet_single_block_samples": added}
    x = torch.randn(flux.shape)
    for scope in SCOPES:
        with attach(flux.model, Recipe(Interval(2)), scope=scope), torch.no_grad():
            computed, skipped = flux(x, 0.5, **more), flux(x, JUST_BELOW_HALF, **more)
        torch.testing.assert_close(skipped, computed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_skipped_whole_network_returns_what_it_is_asked_for(flux, return_dict):
    x = torch.randn(flux.shape)
    with attach(flux.model, Recipe(Interval(2), HoldOutput()), scope=None), torch.no_grad():
        outputs = [
            flux.model(x, timestep=torch.tensor([time]), return_dict=kind, **flux.inputs)
            for kind, time in ((not return_dict, 0.5), (return_dict, JUST_BELOW_HALF))
        ]
    assert type(outputs[1]) is type(outputs[0]) or isinstance(outputs[0], tuple) == return_dict
    assert isinstance(outputs[1], tuple) != return_dict
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not return_dict or torch.equal(outputs[1].sample, outputs[0][0])


# As diffusers does it.


THRESHOLDS = [0.02, 0.32, 0.42, 0.6]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_decisions_and_results_are_those_of_first_block_cache(flux, threshold):
    flux.model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    with counted(flux.model, 1) as theirs:
        expected = denoise(flux, contexts=["cond"])
    flux.model._reset_stateful_cache()
    flux.model.disable_cache()
    with attach(flux.model, Recipe(Threshold(threshold), limits=UNLIMITED)) as caching:
        with counted(flux.model, 1) as ours:
            found = denoise(flux, contexts=["cond"])
        assert len(ours) == caching.cache.stats.computed == len(theirs)
    for result, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)


def test_first_block_cache_skips_some_at_these_thresholds(flux):
    computed = []
    for threshold in THRESHOLDS:
        with attach(flux.model, Recipe(Threshold(threshold), limits=UNLIMITED)) as caching:
            denoise(flux)
            computed.append(caching.cache.stats.computed)
    assert computed[0] == STEPS
    assert len(set(computed)) == len(THRESHOLDS)
    assert computed[-1] < STEPS / 2


@pytest.mark.parametrize("threshold", [0.015, 0.055, 0.2])
def test_decisions_and_results_are_those_of_mag_cache(net, threshold):
    ratios = [1.0, 1.2, 1.01, 0.98, 1.02, 0.99, 0.98, 0.9]
    config = diffusers.MagCacheConfig(
        threshold=threshold, retention_ratio=0.25, num_inference_steps=STEPS, mag_ratios=ratios
    )
    other = type(net)()
    diffusers.apply_mag_cache(other.model, config)
    expected = denoise(other)
    recipe = Recipe(Magnitude(ratios, threshold), limits=Limits(warmup=2, max_consecutive_skips=3))
    with attach(net.model, recipe, scope=BlockRange(0)) as caching:
        found = denoise(net)
        assert 0 < caching.cache.stats.skipped < STEPS - 2
    for result, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)


def test_nan_is_computed_where_first_block_cache_skips(flux):
    x, broken = torch.randn(flux.shape), torch.full(flux.shape, torch.nan)
    with attach(flux.model, Recipe(Threshold(100.0))) as caching, torch.no_grad():
        for time, noisy in zip((0.5, 0.4, 0.3, 0.2), (x, x, broken, x), strict=True):
            flux(noisy, time)
        assert decisions(caching) == [True, False, True, True]


# Streams.


def test_contexts_keep_their_own_histories(flux):
    other = {**flux.inputs, "encoder_hidden_states": torch.randn(1, 4, 32)}
    x = torch.randn(flux.shape)
    with attach(flux.model, Recipe(Interval(2), HoldOutput()), scope=None), torch.no_grad():
        given = {}
        for _ in range(2):
            for name, inputs in (("cond", flux.inputs), ("uncond", other)):
                with flux.model.cache_context(name):
                    given.setdefault(name, []).append(flux(x, 0.5, **inputs))
    assert torch.equal(*given["cond"])
    assert torch.equal(*given["uncond"])
    assert not torch.allclose(given["cond"][1], given["uncond"][1])


@pytest.mark.parametrize("shared", [True, False])
def test_shared_streams_decide_together(flux, shared):
    # The second stream sees a signal that never changes.
    constant = torch.ones(1)

    def signal(block, args, kwargs):
        return constant if caching._call.stream == "uncond" else kwargs["hidden_states"]

    recipe = Recipe(Threshold(0.2), limits=UNLIMITED)
    with attach(flux.model, recipe, signal=signal, shared=shared) as caching:
        denoise(flux, contexts=["cond", "uncond"])
        cond, uncond = (decisions(caching, name) for name in ("cond", "uncond"))
    assert 1 < sum(cond) < STEPS
    assert (uncond == cond) == shared
    assert shared or sum(uncond) == 1


def test_shared_streams_keep_step_when_one_sits_steps_out(flux):
    x = torch.randn(flux.shape)
    mask = [True, False, True, False, True, False]
    recipe = Recipe(StepMask(mask), limits=Limits(steps=6))
    with attach(flux.model, recipe, shared=True) as caching, torch.no_grad():
        for _ in range(2):
            for step in range(6):
                for name in ("cond", "uncond") if step >= 3 else ("cond",):
                    with flux.model.cache_context(name):
                        flux(x, 0.5)
            records = caching.cache.stats.steps
            assert [r.step for r in records if r.stream == "cond"] == [0, 1, 2, 3, 4, 5]
            assert [r.step for r in records if r.stream == "uncond"] == [3, 4, 5]
            assert decisions(caching, "cond") == mask


def test_calls_without_a_context_have_a_stream_of_their_own(flux):
    with attach(flux.model, Recipe(Interval(2)), streams=["a", "b"]) as caching:
        denoise(flux, steps=2)
        assert [record.stream for record in caching.cache.stats.steps] == ["call 1", "call 1"]
        with flux.model.cache_context("c"), pytest.raises(UnknownStreamError, match="'c'"):
            flux(torch.randn(flux.shape), 0.5)


def test_a_step_index_that_a_pipeline_tells_is_the_step(flux):
    with attach(flux.model, Recipe(StepMask([True, False] * STEPS))) as caching:
        denoise(flux, 3, contexts=["cond"], context=lambda step: {"step_index": 2 * step})
        assert [record.step for record in caching.cache.stats.steps] == [0, 2, 4]
        assert decisions(caching) == [True] * 3
        with flux.model.cache_context("cond", step_index=4), pytest.raises(StepOrderError):
            flux(torch.randn(flux.shape), 0.5)


# Runs.


@pytest.mark.parametrize("end", ["pipeline", "steps", "reset", "step_index"])
@pytest.mark.parametrize("scope", SCOPES[:2], ids=SCOPE_NAMES[:2])
def test_nothing_is_left_of_the_run_before(flux, scope, end):
    steps = STEPS if end == "steps" else None
    recipe = Recipe(Interval(3), Taylor(1), Limits(steps=steps))
    told = {"contexts": ["cond"]}
    if end == "step_index":
        told["context"] = lambda step: {"step_index": step}
    with attach(flux.model, recipe, scope=scope) as caching:
        first = denoise(flux, **told)
        if end == "pipeline":
            flux.model._reset_stateful_cache()
        elif end == "reset":
            caching.reset()
        assert (caching.cache.nbytes == 0) == (end in {"pipeline", "reset"})
        again = denoise(flux, **told)
        assert [record.step for record in caching.cache.stats.steps] == [*range(STEPS)]
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "policy", [Interval(3), Threshold(0.4), Threshold(9), Accumulated(0.2, measure=TIMESTEP)]
)
def test_a_run_that_nobody_ended_ends_where_timesteps_rise(flux, policy, shared):
    """Also in the middle, or after two steps; after one, the next begins where that one was."""
    told = {"contexts": ["cond", "uncond"]}
    recipe = Recipe(policy, Taylor(1))
    with attach(flux.model, recipe, shared=shared) as caching:
        first = denoise(flux, **told)
        assert caching.cache.stats.skipped > 0
        numbers = [record.step for record in caching.cache.stats.steps]
        for steps in (0, 2, STEPS // 2 + 1, STEPS):
            denoise(flux, steps=steps, **told)
            if not steps:  # a run that begins late, and ends after one step
                caching.reset()
                with torch.no_grad(), flux.model.cache_context("cond"):
                    flux(torch.ones(flux.shape), 0.5)
            again = denoise(flux, **told)
            assert [record.step for record in caching.cache.stats.steps] == numbers
            assert all(map(torch.equal, first, again))


def test_nan_in_the_middle_does_not_end_a_run(flux):
    with attach(flux.model, Recipe(Threshold(0.4))) as caching, torch.no_grad():
        for number, time in enumerate((1.0, 0.9, 0.8, 0.7)):
            x = torch.full(flux.shape, torch.nan if number == 2 else 1.0)
            flux(x, time)
        records = caching.cache.stats.steps
        assert [record.step for record in records] == [0, 1, 2, 3]
        assert records[2].computed


@pytest.mark.parametrize("scope", SCOPES, ids=SCOPE_NAMES)
@pytest.mark.parametrize(
    "policy", [StepMask([True, True, False]), Threshold(0.001)], ids=["mask", "threshold"]
)
def test_a_forward_that_raises_leaves_the_cache_as_it_was(net, scope, policy):
    x = torch.randn(net.shape)
    with attach(net.model, Recipe(policy, HoldOutput()), scope=scope) as caching, torch.no_grad():
        time = 0.9
        first = net(x, time)
        stats, arrays = caching.cache.stats, caching.cache.arrays()
        values = [array.clone() for array in arrays]
        with broken(net.model.proj_out), pytest.raises(OSError, match="broken"):
            net(2 * x, 0.1)
        assert caching.cache.stats == stats
        assert all(a is b for a, b in zip(caching.cache.arrays(), arrays, strict=True))
        assert all(map(torch.equal, arrays, values))
        for _ in range(2):
            time = np.nextafter(np.float32(time), np.float32(0))
            torch.testing.assert_close(net(x, time.item()), first, rtol=1e-5, atol=1e-5)
        assert [record.step for record in caching.cache.stats.steps] == [0, 1, 2]
        assert decisions(caching)[-1] is False


@contextmanager
def broken(module):
    def fail(*_):
        raise OSError("broken")

    hook = module.register_forward_pre_hook(fail)
    yield
    hook.remove()


def test_detach_gives_back_every_forward(net):
    expected = denoise(net)
    caching = attach(net.model, Recipe(Interval(2)))
    assert "forward" in vars(net.model)
    skipping = denoise(net)
    assert not torch.equal(skipping[-1], expected[-1])
    assert caching.cache.nbytes > 0
    caching.detach()
    caching.detach()
    assert not [module for module in net.model.modules() if "forward" in vars(module)]
    assert caching.cache.nbytes == 0
    assert all(map(torch.equal, denoise(net), expected))
    with attach(net.model, Recipe(Interval(2))):
        assert all(map(torch.equal, denoise(net), skipping))


def test_detach_leaves_what_others_have_put_around_a_forward(flux):
    theirs = diffusers.hooks.ModelHook()
    block = flux.model.transformer_blocks[1]
    expected = denoise(flux)
    caching = attach(flux.model, Recipe(Interval(2)))
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(block).register_hook(theirs, "x")
    caching.detach()
    assert block._diffusers_hook.get_hook("x") is theirs
    assert all(map(torch.equal, denoise(flux), expected))


# What is kept.


@pytest.mark.parametrize("scope", SCOPES, ids=SCOPE_NAMES)
@pytest.mark.parametrize("predictor", [HoldOutput(), HoldResidual(), Taylor(1)])
def test_no_graph_is_kept(net, scope, predictor):
    x = torch.randn(net.shape, requires_grad=True)
    with attach(net.model, Recipe(Threshold(0.5), predictor), scope=scope) as caching:
        computed, skipped = net(x, 0.5), net(x, JUST_BELOW_HALF)
        assert decisions(caching) == [True, False]
        assert computed.requires_grad
        arrays = caching.cache.arrays()
        assert arrays
        assert not any(array.requires_grad for array in arrays)
        computed.sum().backward()
        torch.testing.assert_close(skipped.detach(), computed.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES, ids=SCOPE_NAMES)
def test_inference_mode_gives_what_no_grad_gives(net, scope):
    recipe = Recipe(Accumulated(0.5), Taylor(1))
    with attach(net.model, recipe, scope=scope) as caching:
        expected = denoise(net)
        assert caching.cache.stats.skipped
        caching.reset()
        with torch.inference_mode():
            found = denoise(net)
        again = denoise(net, steps=2)
    assert all(map(torch.equal, found, expected))
    assert len(again[0]) == 2


def test_callers_may_write_to_what_they_gave_and_got(flux):
    expected = []
    for scope in SCOPES:
        for write in (False, True):
            x = torch.randn(flux.shape, generator=torch.Generator().manual_seed(2))
            recipe = Recipe(Interval(3), HoldOutput())
            with attach(flux.model, recipe, scope=scope), torch.no_grad():
                outputs = []
                for step in range(4):
                    given = x.clone()
                    outputs.append(flux(given, 1 - step / 4))
                    kept = outputs[-1].clone()
                    if write:
                        given.zero_()
                        outputs[-1].zero_()
                    outputs[-1] = kept
            expected.append(torch.stack(outputs))
        assert torch.equal(expected[-1], expected[-2])


class Scalars(TorchDispatchMode):
    """Counts the operations that bring a scalar to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", SCOPES, ids=SCOPE_NAMES)
@pytest.mark.parametrize("context", ["cond", None])
@pytest.mark.parametrize(
    ("policy", "time", "scalars", "copies"),
    [
        (Threshold(0.4), "step", 0, 1),
        (Accumulated(0.5), "step", 0, 1),
        (Interval(2), "step", 1, 0),
        (Interval(2), "timestep", 2, 0),
        (Accumulated(0.2, (1, 0), TIMESTEP), "timestep", 2, 0),
    ],
)
def test_a_decision_waits_for_one_scalar(
    flux, monkeypatch, scope, policy, time, scalars, copies, context
):
    """And for the timestep where it goes by that, or no context says which pass a call is."""
    backend = type(get_backend("torch"))
    brought = []
    to_host = backend.to_host
    monkeypatch.setattr(backend, "to_host", lambda self, a: brought.append(a) or to_host(self, a))
    with Scalars() as alone:
        denoise(flux, contexts=[context])
    with attach(flux.model, Recipe(policy, Taylor(1)), scope=scope, time=time) as caching:
        with Scalars() as cached:
            denoise(flux, contexts=[context])
        assert 0 < caching.cache.stats.skipped < STEPS
    # The network itself reads some when it is computed.
    scalars += context is None and time == "step"
    assert cached.count - alone.count <= scalars * STEPS
    assert len(brought) == copies * (STEPS - 1)
    assert all(array.numel() == 1 for array in brought)


def test_a_schedule_waits_for_nothing_where_the_step_is_told(flux):
    told = {"contexts": ["cond"], "context": lambda step: {"step_index": step}}
    with Scalars() as alone:
        denoise(flux, **told)
    with attach(flux.model, Recipe(Interval(2), Taylor(1)), scope=None), Scalars() as cached:
        denoise(flux, **told)
    assert cached.count <= alone.count


def test_the_timestep_is_read_only_where_it_counts(flux):
    x = torch.randn(flux.shape)
    for policy, time in ((Interval(2), "timestep"), (Accumulated(0.3, (1, 0), TIMESTEP), "step")):
        recipe = Recipe(policy, HoldOutput())
        with (
            attach(flux.model, recipe, scope=None, time=time),
            pytest.raises(NotSupportedError, match=r"timestep=\.\.\."),
        ):
            flux.model(x, **flux.inputs)
    recipe = Recipe(Accumulated(0.3, (1, 0), TIMESTEP))
    with attach(flux.model, recipe) as caching, torch.no_grad():
        for t in (1.0, 0.9, 0.8, 0.6, 0.5):
            flux(x, t)
        assert decisions(caching) == [True, False, False, True, False]


def test_extrapolation_goes_by_the_timestep_where_asked(flux):
    # A network that is linear in time.
    flux.model.forward = lambda hidden_states, timestep: (hidden_states * 0 + timestep,)
    x = torch.zeros(flux.shape)
    recipe = Recipe(StepMask([True, True, False]), Taylor(1))
    given = {}
    for time in ("step", "timestep"):
        with attach(flux.model, recipe, scope=None, time=time):
            given[time] = [
                flux.model(hidden_states=x, timestep=torch.tensor([t]))[0].mean()
                for t in (1.0, 0.8, 0.3)
            ]
    assert given["timestep"][-1] == pytest.approx(0.3)
    assert given["step"][-1] == pytest.approx(0.6)


# What is refused.


def test_one_cache_at_a_time(flux):
    with attach(flux.model, Recipe(Interval(2))) as caching:
        with pytest.raises(NotSupportedError, match="detach"):
            attach(flux.model, Recipe(Interval(2)))
        flux.model.enable_cache(diffusers.FirstBlockCacheConfig())
        with pytest.raises(NotSupportedError, match="disable_cache"):
            flux(torch.randn(flux.shape), 0.5)
        assert not caching.cache.stats.steps
    with pytest.raises(NotSupportedError, match="disable_cache"):
        attach(flux.model, Recipe(Interval(2)))
    flux.model.disable_cache()
    attach(flux.model, Recipe(Interval(2))).detach()


def test_a_module_without_blocks_is_refused():
    with pytest.raises(NotSupportedError, match=r"single_transformer_blocks.*Linear has none"):
        attach(torch.nn.Linear(2, 2), Recipe(Interval(2)))


def test_blocks_that_diffusers_does_not_know_are_refused(flux):
    flux.model.transformer_blocks.append(torch.nn.Linear(2, 2))
    with pytest.raises(NotSupportedError, match=r"Linear.*TransformerBlockRegistry"):
        attach(flux.model, Recipe(Interval(2)))
    attach(flux.model, Recipe(Interval(2)), scope=None).detach()


@pytest.mark.parametrize("scope", [None, BlockRange(0)])
def test_without_a_signal_to_measure_one_is_asked_for(scope):
    net = Wan()
    with pytest.raises(NotSupportedError, match=r"WanTransformerBlock has none.*signal="):
        attach(net.model, Recipe(Accumulated(0.1)), scope=scope)
    attach(net.model, Recipe(Interval(2)), scope=scope).detach()
    seen = []

    def signal(block, args, kwargs):
        seen.append((block, len(args) + len(kwargs)))
        return args[0]

    recipe = Recipe(Accumulated(0.3), HoldOutput())
    with attach(net.model, recipe, scope=scope, signal=signal) as caching:
        denoise(net)
        assert caching.cache.stats.skipped > 0
    assert {block for block, _ in seen} == {net.model.blocks[0]}
    assert len(seen) == STEPS


def test_wrong_values_are_refused(flux):
    with pytest.raises(ValueError, match=r"step.*timestep.*'sigma'"):
        attach(flux.model, Recipe(Interval(2)), time="sigma")
    with pytest.raises(ValueError, match="leave none to skip"):
        attach(flux.model, Recipe(Interval(2)), scope=BlockRange(2, 2))
    assert not [module for module in flux.model.modules() if "forward" in vars(module)]


def test_a_block_that_somebody_calls_by_itself_is_computed(flux):
    block = flux.model.transformer_blocks[1]
    states = torch.randn(1, 16, 32), torch.randn(1, 4, 32), torch.randn(1, 32)
    with torch.no_grad():
        expected = block(*states)
        with attach(flux.model, Recipe(Interval(2))) as caching:
            denoise(flux, steps=2)
            assert decisions(caching) == [True, False]
            assert all(map(torch.equal, block(*states), expected))
            assert len(decisions(caching)) == 2


def test_where_text_and_image_become_one_the_text_comes_first():
    image, text = torch.ones(1, 4, 2), torch.zeros(1, 3, 2)
    (joined,) = aligned((image, text), [torch.Size([1, 7, 2])])
    assert torch.equal(joined, torch.cat([text, image], dim=1))


def test_a_skipped_whole_network_returns_what_a_computed_one_does(flux):
    kind = diffusers.models.modeling_outputs.AutoencoderKLOutput
    flux.model.forward = kind
    with attach(flux.model, Recipe(Interval(2), HoldOutput()), scope=None):
        outputs = [flux.model(torch.ones(1, 2)) for _ in range(2)]
    assert [type(output) for output in outputs] == [kind, kind]


def test_without_diffusers_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from kvcache import BackendNotAvailableError\n"
        "try:\n    import kvcache.adapters.diffusers\n"
        "except BackendNotAvailableError as error:\n    print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'kvcache[diffusers]'" in shown.stdout
