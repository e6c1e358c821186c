"""Runs with the samplers of diffusers, and those that start lower after one was given up."""

import inspect
import math
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers import schedulers  # noqa: E402
from diffusers.models.cache_utils import CacheMixin  # noqa: E402

from kvcache.adapters.diffusers import attach  # noqa: E402
from kvcache.diffusion import HoldOutput, Interval, Recipe  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE = 512
IMAGES = torch.randn(12, SIZE, generator=torch.Generator().manual_seed(1000))
"""All there is to draw. Prompted, it is one of the first four."""
RECIPE = Recipe(Interval(2), HoldOutput())
KARRAS = {"use_karras_sigmas": True}


class Denoiser(torch.nn.Module, CacheMixin):
    """The exact network for `IMAGES` under a rectified flow, guided."""

    def forward(self, hidden_states, timestep):
        signal, noise = self.levels(float(timestep))
        prompted = self.expected(hidden_states, signal, noise, IMAGES[:4])
        data = self.expected(hidden_states, signal, noise, IMAGES)
        data = data + 2 * (prompted - data)
        return ((hidden_states - signal * data) / noise,)

    @staticmethod
    def levels(timestep):
        """How much there is of data and of noise."""
        return 1 - timestep / 1000, timestep / 1000

    @staticmethod
    def expected(x, signal, noise, images):
        distances = ((x[:, None] - signal * images) ** 2).sum(-1)
        return torch.softmax(-distances / (2 * noise**2), -1) @ images


class Diffusing(Denoiser):
    """That for the noise which most samplers of diffusers go by."""

    KEPT = schedulers.DDIMScheduler().alphas_cumprod

    @classmethod
    def levels(cls, timestep):
        kept = float(cls.KEPT[round(timestep)])
        return math.sqrt(kept), math.sqrt(1 - kept)


def noise(seed=0):
    return torch.randn(1, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(model, scheduler, steps, x=None, first=0, last=None, *, named=False):
    """What the network gives in the steps from `first` to `last`, called as by a pipeline.

    steps: how many the whole run has, or its levels of noise.
    """
    scheduler.set_timesteps(
        **{"sigmas" if isinstance(steps, list) else "num_inference_steps": steps}
    )
    x = noise() * getattr(scheduler, "init_noise_sigma", 1.0) if x is None else x
    if first:
        scheduler.set_begin_index(first)
    generator = torch.Generator().manual_seed(1)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    given = []
    for timestep in scheduler.timesteps[first:last]:
        scaled = x
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, timestep)
        with model.cache_context("cond") if named else nullcontext():
            given.append(model(scaled, timestep)[0])
        x = scheduler.step(
            given[-1], timestep, x, return_dict=False, **({"generator": generator} if draws else {})
        )[0]
    return given


FLOW_OF_UNIPC = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
}
DISTILLED = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]
"""Of LTX: steps grow tenfold."""
SAMPLERS = {
    "flow": ("FlowMatchEulerDiscrete", {}, (8, 20, 50)),
    "flow, shift 3": ("FlowMatchEulerDiscrete", {"shift": 3.0}, (8, 20, 50)),
    "flow, shift 12": ("FlowMatchEulerDiscrete", {"shift": 12.0}, (8, 20, 50)),
    "flow, Karras": ("FlowMatchEulerDiscrete", KARRAS, (8, 20, 50)),
    "flow, distilled": ("FlowMatchEulerDiscrete", {}, (DISTILLED,)),
    "flow, second order": ("FlowMatchHeunDiscrete", {}, (12, 20, 50)),
    "flow, second order, shift 3": ("FlowMatchHeunDiscrete", {"shift": 3.0}, (12, 20, 50)),
    "flow, UniPC": ("UniPCMultistep", FLOW_OF_UNIPC, (8, 20, 50)),
    "DDIM": ("DDIM", {"clip_sample": False}, (8, 20, 50)),
    "Euler": ("EulerDiscrete", {}, (8, 20, 50)),
    "Euler, Karras": ("EulerDiscrete", KARRAS, (8, 20, 50)),
    "Heun": ("HeunDiscrete", {}, (12, 20, 50)),
    "Heun, Karras": ("HeunDiscrete", KARRAS, (12, 20, 50)),
    "DPM++ 2M": ("DPMSolverMultistep", {}, (8, 20, 50)),
    "DPM++ 2M, Karras": ("DPMSolverMultistep", KARRAS, (8, 20, 50)),
    "UniPC": ("UniPCMultistep", {}, (8, 20, 50)),
}


@pytest.mark.parametrize(("name", "options", "runs"), SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
def test_no_run_begins_within_that_of_a_sampler(name, options, runs, named):
    """From 8 steps on, 12 of second order; these latents turn to one image all at once."""
    scheduler = getattr(schedulers, f"{name}Scheduler")(**options)
    flows = name.startswith("FlowMatch") or "use_flow_sigmas" in options
    model = Denoiser() if flows else Diffusing()
    for steps in runs:
        with attach(model, RECIPE, scope=None) as caching:
            calls = len(sample(model, scheduler, steps, named=named))
            # The records are those of one run.
            assert len(caching.cache.stats.steps) == calls, steps
            assert caching.cache.stats.skipped >= calls // 2 - 1


# Runs that start lower: noise mixed with an image, at a timestep further on.


def lower(scheduler, steps, first, image, seed=0):
    """What a run begins with that leaves out the first steps."""
    scheduler.set_timesteps(steps)
    level = float(scheduler.timesteps[first]) / 1000
    return level * noise(seed) + (1 - level) * image


OTHERS = {"another": IMAGES[9:10], "foreign": 0.7 * noise(7)}


@pytest.mark.parametrize("image", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("made", [2, 3, 5, 8])
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
def test_a_lower_start_of_the_same_noise_begins_fresh(image, made, steps, named):
    """Bit for bit as after `attach`, and with its work."""
    model = Denoiser()
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
    for first in (steps * 2 // 5, steps // 2, steps * 3 // 5):
        x = lower(scheduler, steps, first, image)
        with attach(model, RECIPE, scope=None) as caching:
            expected = sample(model, scheduler, steps, x, first, named=named)
            work = caching.cache.stats
        with attach(model, RECIPE, scope=None) as caching:
            sample(model, scheduler, steps, last=made, named=named)
            found = sample(model, scheduler, steps, x, first, named=named)
            assert all(map(torch.equal, found, expected)), first
            assert caching.cache.stats == work


@pytest.mark.parametrize("image", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
def test_after_a_single_step_a_start_far_lower_begins_fresh(image, named):
    model = Denoiser()
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
    x = lower(scheduler, 20, 14, image)
    with attach(model, RECIPE, scope=None):
        expected = sample(model, scheduler, 20, x, 14, named=named)
    with attach(model, RECIPE, scope=None):
        sample(model, scheduler, 20, last=1, named=named)
        found = sample(model, scheduler, 20, x, 14, named=named)
        assert all(map(torch.equal, found, expected))


def test_a_sampler_that_draws_noise_begins_one_run_more_at_most():
    """Its first move may be that of another run; after that, such moves are known."""
    model = Diffusing()
    for name in ("DDPM", "EulerAncestralDiscrete"):
        scheduler = getattr(schedulers, f"{name}Scheduler")()
        with attach(model, RECIPE, scope=None) as caching:
            calls = len(sample(model, scheduler, 20))
            assert len(caching.cache.stats.steps) >= calls - 1


def test_numbers_that_are_broken_begin_no_run():
    """Neither do those after them."""
    model = Denoiser()
    x = noise()
    with attach(model, RECIPE, scope=None) as caching, torch.no_grad():
        for step in range(8):
            given = torch.full_like(x, torch.nan) if step == 3 else (1 - step / 20) * x
            model(given, torch.tensor(1000.0 - 50 * step))
        assert len(caching.cache.stats.steps) == 8
        model(0.55 * x + 0.3 * IMAGES[:1], torch.tensor(300.0))
        assert len(caching.cache.stats.steps) == 1


@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
def test_a_run_that_rises_is_told_by_its_latents_too(named):
    """From its second step on, which seems to begin another run until there is a third."""
    model = Denoiser()
    x = noise()
    calls = [(10, x), (60, 0.95 * x), (600, 0.6 * x + 0.4 * IMAGES[:1])]
    with attach(model, RECIPE, scope=None) as caching, torch.no_grad():
        for timestep, given in calls:
            with model.cache_context("cond") if named else nullcontext():
                model(given, torch.tensor(float(timestep)))
        assert [record.step for record in caching.cache.stats.steps] == [0]
