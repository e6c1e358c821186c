"""Passes and runs of pipelines that tell neither, inside diffusers' transformers."""

import inspect
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers import guiders  # noqa: E402
from diffusers.hooks._helpers import (  # noqa: E402
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)

from kvcache import NotSupportedError  # noqa: E402
from kvcache.adapters.diffusers import STREAMS, attach  # noqa: E402
from kvcache.diffusion import (  # noqa: E402
    BlockRange,
    HoldOutput,
    Interval,
    Limits,
    Recipe,
    StepMask,
    Taylor,
    Threshold,
)

FALLING = [1 - step / 8 for step in range(8)]
RISING = [step / 8 for step in range(8)]
COND, UNCOND = 1, 2
NAMES = {COND: "cond", UNCOND: "uncond"}
SCHEDULE = Recipe(Interval(2), HoldOutput())
FIRST_BLOCK = Recipe(Threshold(0.3), Taylor(1, residual=True))
RECIPES = pytest.mark.parametrize("recipe", [SCHEDULE, FIRST_BLOCK], ids=["schedule", "measured"])


@pytest.fixture
def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def conditions(prompt, tokens=4):
    generator = torch.Generator().manual_seed(prompt)
    return {
        "encoder_hidden_states": torch.randn(1, tokens, 32, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "txt_ids": torch.zeros(tokens, 3),
    }


def noise(seed=0, tokens=16):
    return torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(seed))


def call(model, x, time, prompt=COND, given=None):
    """The velocity at `time`; conditions are made anew unless `given`."""
    inputs = conditions(prompt) if given is None else given[prompt]
    ids = torch.zeros(x.shape[1], 3)
    timestep = torch.tensor([time])
    return model(x, timestep=timestep, img_ids=ids, return_dict=False, **inputs)[0]


@torch.no_grad()
def sample(model, times, x=None, passes=(COND,), *, named=False, given=None):
    """Every velocity, by pass, of an Euler loop, guided where there are two passes.

    passes: the passes of a step in their order, or a function from steps to these.
    """
    x = noise() if x is None else x
    velocities = []
    for step, time in enumerate(times):
        found = {}
        for prompt in passes(step) if callable(passes) else passes:
            with model.cache_context(NAMES[prompt]) if named else nullcontext():
                found[prompt] = call(model, x, time, prompt, given)
        velocities.append([found[prompt] for prompt in sorted(found)])
        cond = found[COND]
        x = x - 0.1 * (cond if UNCOND not in found else cond + 2 * (cond - found[UNCOND]))
    return velocities


def same(found, expected):
    """Whether two results of `sample` are the same, bit for bit."""
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


def work(caching):
    return [(record.step, record.computed) for record in caching.cache.stats.steps]


GUIDANCE = {
    "none": (COND,),
    "conditional first": (COND, UNCOND),
    "unconditional first": (UNCOND, COND),
    "from the third step": lambda step: (COND,) if step < 3 else (UNCOND, COND),
    "until the fifth step": lambda step: (UNCOND, COND) if step < 5 else (COND,),
}


# Passes without a context.


@RECIPES
@pytest.mark.parametrize("times", [FALLING, RISING], ids=["falling", "rising"])
@pytest.mark.parametrize("passes", GUIDANCE.values(), ids=GUIDANCE.keys())
def test_passes_are_told_apart_as_by_contexts(flux, recipe, times, passes):
    with attach(flux, recipe) as caching:
        expected = sample(flux, times, passes=passes, named=True)
        work_expected = work(caching)
    with attach(flux, recipe) as caching:
        assert same(sample(flux, times, passes=passes), expected)
        assert work(caching) == work_expected
        assert caching.cache.stats.skipped > 2


@pytest.mark.parametrize("recipe", [Recipe(Interval(1), HoldOutput()), Recipe(Threshold(0))])
@pytest.mark.parametrize("times", [FALLING, RISING], ids=["falling", "rising"])
@pytest.mark.parametrize("passes", GUIDANCE.values(), ids=GUIDANCE.keys())
def test_without_a_skip_nothing_changes(flux, recipe, times, passes):
    expected = sample(flux, times, passes=passes)
    with attach(flux, recipe) as caching:
        assert same(sample(flux, times, passes=passes), expected)
        assert caching.cache.stats.skipped == 0


def test_guidance_is_that_of_its_own_pass(flux):
    """Each pass is predicted from its own steps: nearer to them than to the other pass."""
    exact = sample(flux, FALLING, passes=(COND, UNCOND))
    with attach(flux, SCHEDULE):
        found = sample(flux, FALLING, passes=(COND, UNCOND))
    for (cond, uncond), (exact_cond, exact_uncond) in zip(found, exact, strict=True):
        assert (cond - exact_cond).norm() < 0.5 * (cond - exact_uncond).norm()
        assert (uncond - exact_uncond).norm() < 0.5 * (uncond - exact_cond).norm()


def test_passes_with_the_same_conditions_are_told_apart_by_their_order(flux):
    """As those of a guidance that skips layers."""
    x = noise()
    with attach(flux, SCHEDULE, scope=None) as caching, torch.no_grad():
        first = [call(flux, x, 0.5), call(flux, 2 * x, 0.5)]
        held = [call(flux, x, 0.4), call(flux, 2 * x, 0.4)]
        assert [record.stream for record in caching.cache.stats.steps] == ["call 1", "call 2"] * 2
    assert all(map(torch.equal, first, held))
    assert not torch.equal(*first)


def test_a_sampler_of_second_order_has_twice_the_passes(flux):
    """It comes twice to every timestep but the first."""
    times = [1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7]
    with attach(flux, SCHEDULE) as caching:
        sample(flux, times, passes=(COND, UNCOND))
        streams = [record.stream for record in caching.cache.stats.steps]
    twice = ["call 1", "call 2", "call 3", "call 4"]
    assert streams == ["call 1", "call 2", *twice, *twice, *twice]


def test_conditions_are_compared_where_the_same_tensor_was_written_to(flux):
    """One buffer for both prompts."""

    class Buffer:
        tensors = conditions(COND)

        def __getitem__(self, prompt):
            for name, tensor in conditions(prompt).items():
                self.tensors[name].copy_(tensor)
            return self.tensors

    with attach(flux, SCHEDULE):
        expected = sample(flux, FALLING, passes=(COND, UNCOND), named=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with attach(flux, SCHEDULE), mode():
            assert same(sample(flux, FALLING, passes=(COND, UNCOND), given=Buffer()), expected)


def test_conditions_that_stay_are_not_compared(flux, monkeypatch):
    given = {prompt: conditions(prompt) for prompt in NAMES}
    compared = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(a) or equal(a, b))
    with attach(flux, SCHEDULE) as caching:
        sample(flux, FALLING, passes=(COND,), given=given)
        assert caching.cache.stats.skipped == len(FALLING) / 2
    assert not compared


def test_more_passes_than_can_be_told_apart_are_refused(flux):
    with attach(flux, SCHEDULE) as caching, torch.no_grad():
        for prompt in range(8):
            call(flux, noise(), 0.5, prompt)
        before = caching.cache.stats
        with pytest.raises(NotSupportedError, match=r"at most 8 passes.*cache_context"):
            call(flux, noise(), 0.5, 8)
        assert caching.cache.stats == before
        call(flux, noise(), 0.4, 0)
        assert caching.cache.stats.skipped == 1


def test_timesteps_by_token_are_told_apart(flux):
    """Those of a given image stay 0."""
    flux.forward = lambda hidden_states, timestep: (hidden_states * timestep.mean(),)
    with attach(flux, SCHEDULE, scope=None) as caching:
        for time in (0.9, 0.8, 0.7, 0.6):
            flux(hidden_states=noise(), timestep=torch.tensor([[0.0, time]]))
        assert [record.computed for record in caching.cache.stats.steps] == [True, False] * 2


def test_every_guider_of_diffusers_has_its_streams(flux):
    kinds = [kind for _, kind in inspect.getmembers(guiders, inspect.isclass)]
    names = {name for kind in kinds for name in getattr(kind, "_input_predictions", None) or ()}
    assert {"pred_cond", "pred_uncond", "pred_cond_skip"} <= names <= set(STREAMS)
    with attach(flux, SCHEDULE) as caching, torch.no_grad():
        for time in (1.0, 0.9):
            for name in sorted(names):
                with flux.cache_context(name):
                    call(flux, noise(), time)
        assert caching.cache.stats.skipped == len(names)


# Runs that nobody ended.


def assert_fresh(flux, recipe, first, second, **options):
    """The second run is what it is after :func:`attach`."""
    with attach(flux, recipe) as caching:
        expected = sample(flux, **second, **options)
        steps = work(caching)
    with attach(flux, recipe) as caching:
        sample(flux, **first, **options)
        assert same(sample(flux, **second, **options), expected)
        assert work(caching) == steps


CANCELLED = {
    "the same again": ({"times": FALLING[:4]}, {"times": FALLING}),
    "a lower start": ({"times": FALLING[:4], "x": noise(1)}, {"times": FALLING[5:]}),
    "the next timestep": ({"times": FALLING[:4], "x": noise(1)}, {"times": FALLING[4:]}),
    "a lower start of the same noise": ({"times": FALLING[:4]}, {"times": FALLING[5:]}),
    "after one step": ({"times": FALLING[:1], "x": noise(1)}, {"times": FALLING}),
    "after one step, lower": ({"times": FALLING[:1], "x": noise(1)}, {"times": FALLING[4:]}),
    "after one late step": ({"times": [0.5]}, {"times": FALLING}),
    "inversion": ({"times": FALLING[:4]}, {"times": RISING}),
    "rising again": ({"times": RISING[:4]}, {"times": RISING}),
    "rising, from later on": ({"times": RISING[:4], "x": noise(1)}, {"times": RISING[5:]}),
    "rising, from later on, same noise": ({"times": RISING[:4]}, {"times": RISING[5:]}),
    "rising, then falling": ({"times": RISING[:4]}, {"times": FALLING}),
}


@RECIPES
@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
@pytest.mark.parametrize(("first", "second"), CANCELLED.values(), ids=CANCELLED.keys())
def test_a_run_after_one_that_was_given_up_begins_fresh(flux, recipe, first, second, named):
    assert_fresh(flux, recipe, first, second, passes=(COND, UNCOND), named=named)


@RECIPES
@pytest.mark.parametrize("scope", [None, BlockRange(1)], ids=["whole", "F1B0"])
@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("passes", [(COND,), (COND, UNCOND)], ids=["unguided", "guided"])
def test_another_size_begins_fresh(flux, recipe, scope, named, steps, passes):
    if scope is None:
        recipe = SCHEDULE
    options = {"passes": passes, "named": named}
    with attach(flux, recipe, scope=scope):
        expected = sample(flux, FALLING, noise(tokens=36), **options)
    with attach(flux, recipe, scope=scope) as caching:
        sample(flux, FALLING[:steps], **options)
        assert same(sample(flux, FALLING, noise(tokens=36), **options), expected)
        assert len(caching.cache.stats.steps) == len(FALLING) * len(passes)


def test_passes_of_other_sizes_are_no_other_run(flux):
    """As those of a guidance that skips layers, which follows a batch of both prompts."""
    both = {name: torch.cat([part] * 2) for name, part in conditions(COND).items()}
    both["txt_ids"] = conditions(COND)["txt_ids"]
    with attach(flux, SCHEDULE) as caching, torch.no_grad():
        x = noise()
        for time in FALLING:
            batch = call(flux, x.repeat(2, 1, 1), time, given={COND: both})
            x = x - 0.1 * (batch[:1] + call(flux, x, time))
        streams = [record.stream for record in caching.cache.stats.steps]
        assert streams == ["call 1", "call 2"] * len(FALLING)
        assert caching.cache.stats.skip_rate == 0.5


@RECIPES
@pytest.mark.parametrize("passes", [(COND,), (COND, UNCOND)], ids=["unguided", "guided"])
@pytest.mark.parametrize("last", [1, 2], ids=["after one pass", "after all"])
def test_one_step_may_be_given_up_time_and_again(flux, recipe, passes, last):
    """With the same noise, at the same timestep: as passes that are yet to be told apart are."""
    with attach(flux, recipe):
        expected = sample(flux, FALLING, passes=passes)
    with attach(flux, recipe) as caching:
        for _ in range(12):
            sample(flux, FALLING[:1], passes=passes[:last])
        assert same(sample(flux, FALLING, passes=passes), expected)
        assert caching.cache.stats.skipped > 2


def test_passes_that_were_too_many_do_not_stand_in_the_way_of_another_run(flux):
    """Of other noise, of another size, at another timestep."""
    others = {
        "noise": {"times": FALLING, "x": noise(1)},
        "size": {"times": FALLING, "x": noise(tokens=36)},
        "timestep": {"times": [1.1, *FALLING]},
    }
    given = {COND: conditions(8)}
    for name, other in others.items():
        with attach(flux, SCHEDULE):
            expected = sample(flux, **other, given=given)
        with attach(flux, SCHEDULE) as caching, torch.no_grad():
            for prompt in range(8):
                call(flux, noise(), 1.0, prompt)
            assert same(sample(flux, **other, given=given), expected), name
            assert len(caching.cache.stats.steps) == len(other["times"])


def test_a_pass_too_many_that_is_called_again_begins_another_run(flux):
    """The same noise, and a prompt that is new, of a run after others that were given up."""
    given = {COND: conditions(8)}
    with attach(flux, SCHEDULE):
        expected = sample(flux, FALLING, given=given)
    with attach(flux, SCHEDULE) as caching, torch.no_grad():
        for prompt in range(8):
            call(flux, noise(), 1.0, prompt)
        before, arrays = caching.cache.stats, caching.cache.arrays()
        with pytest.raises(NotSupportedError, match=r"another run, make it again"):
            call(flux, noise(), 1.0, 8)
        assert caching.cache.stats == before
        assert all(a is b for a, b in zip(caching.cache.arrays(), arrays, strict=True))
        assert same(sample(flux, FALLING, given=given), expected)
        assert len(caching.cache.stats.steps) == len(FALLING)


def test_a_pass_that_goes_on_forgets_one_too_many(flux):
    """The next that is too many is refused as the first was."""
    with attach(flux, SCHEDULE), torch.no_grad():
        for time in (1.0, 0.9):
            for prompt in range(8):
                call(flux, noise(), time, prompt)
            with pytest.raises(NotSupportedError, match="at most 8 passes"):
                call(flux, noise(), time, 8)


def test_a_prompt_of_another_length_begins_fresh(flux):
    longer = {COND: conditions(COND, tokens=7)}
    for named in (False, True):
        with attach(flux, FIRST_BLOCK):
            expected = sample(flux, FALLING[4:], noise(1), given=longer, named=named)
        with attach(flux, FIRST_BLOCK):
            sample(flux, FALLING[:4], named=named)
            found = sample(flux, FALLING[4:], noise(1), given=longer, named=named)
            assert same(found, expected)


def test_a_run_of_so_many_steps_ends_for_every_stream(flux):
    """Also for one that began late, and has passed fewer."""
    late = GUIDANCE["from the third step"]
    recipe = Recipe(Interval(3), HoldOutput(), Limits(steps=8))
    with attach(flux, recipe) as caching:
        first = sample(flux, FALLING, passes=late, named=True)
        assert same(sample(flux, FALLING, passes=late, named=True), first)
        assert len(caching.cache.stats.steps) == 8 + 5


@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_step_told_again_begins_a_run(flux, steps):
    def told(steps, seed):
        with torch.no_grad():
            for step in range(steps):
                for name in ("cond", "uncond"):
                    with flux.cache_context(name, step_index=step):
                        yield call(flux, noise(seed), 1 - step / 8)

    with attach(flux, SCHEDULE):
        expected = list(told(4, 0))
    with attach(flux, SCHEDULE) as caching:
        list(told(steps, 1))
        assert all(map(torch.equal, told(4, 0), expected))
        assert len(caching.cache.stats.steps) == 8


def test_rising_timesteps_keep_the_numbers_of_steps(flux):
    """The second step begins anew, for it may be of another run; the third knows both."""
    mask = [True, False, False, True, False, False, True, False]
    with attach(flux, Recipe(StepMask(mask), HoldOutput())) as caching:
        sample(flux, RISING, passes=(COND, UNCOND), named=True)
        for name in NAMES.values():
            records = [r for r in caching.cache.stats.steps if r.stream == name]
            assert [r.step for r in records] == [0, 2, 3, 4, 5, 6, 7]
            assert [r.computed for r in records] == [True, *mask[2:]]


def test_a_forward_that_raises_where_a_run_begins_leaves_the_one_before(flux):
    with attach(flux, SCHEDULE) as caching, torch.no_grad():
        for time in FALLING[:3]:
            call(flux, noise(), time)
        before, arrays = caching.cache.stats, caching.cache.arrays()
        hook = flux.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(flux, noise(), 1.0)
        hook.remove()
        assert caching.cache.stats == before
        assert all(a is b for a, b in zip(caching.cache.arrays(), arrays, strict=True))
        call(flux, noise(), FALLING[3])
        assert [record.computed for record in caching.cache.stats.steps] == [True, False] * 2


# Blocks that are not as others.


def z_image():
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 64, 64],
    ).eval()
    # What a random one multiplies its blocks with is empty memory.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def z_sample(model, times=RISING):
    """An Euler loop of Z-Image: lists of images and captions, timesteps that rise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    caption = torch.randn(5, 16, generator=generator)
    for time in times:
        x = x - 0.1 * model([x], torch.tensor([time]), [caption], return_dict=False)[0][0]
    return x


def test_blocks_that_name_their_hidden_states_otherwise():
    model = z_image()
    expected = z_sample(model)
    assert expected.isfinite().all()
    with attach(model, Recipe(Threshold(0))):
        assert torch.equal(z_sample(model), expected)
    with attach(model, SCHEDULE) as caching:
        error = (z_sample(model) - expected).norm() / expected.norm()
        assert caching.cache.stats.skipped > 2
    assert 0 < error < 0.5


def test_a_list_of_images_is_refused_before_the_network_runs():
    model, ran = z_image(), []
    model.all_final_layer.register_forward_hook(lambda *_: ran.append(1))
    with (
        attach(model, SCHEDULE, scope=None),
        pytest.raises(NotSupportedError, match=r"tensor as x; got list.*BlockRange\(1\)"),
    ):
        z_sample(model)
    assert not ran


class OddBlock(torch.nn.Module):
    def forward(self, tokens):
        return tokens


class InPlace(torch.nn.Module):
    """A block that writes to what it is given."""

    def __init__(self, added):
        super().__init__()
        self.added = added

    def forward(self, hidden_states):
        hidden_states += self.added
        return hidden_states


class Stack(torch.nn.Module):
    """A transformer of blocks that write to their input."""

    def __init__(self, *blocks):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(blocks)
        self.skipped = ()

    def forward(self, hidden_states, timestep):
        for index, block in enumerate(self.transformer_blocks):
            if index not in self.skipped:
                hidden_states = block(hidden_states)
        return (hidden_states,)


@pytest.fixture
def registered():
    TransformerBlockRegistry.register(InPlace, TransformerBlockMetadata(0, None))
    TransformerBlockRegistry.register(OddBlock, TransformerBlockMetadata(0, None))
    yield
    for kind in (InPlace, OddBlock):
        del TransformerBlockRegistry._registry[kind]


@pytest.mark.usefixtures("registered")
def test_a_block_that_diffusers_describes_wrongly_is_refused_at_once():
    model = Stack(OddBlock(), OddBlock())
    with pytest.raises(NotSupportedError, match=r"OddBlock takes 'hidden_states'.*tokens"):
        attach(model, SCHEDULE)
    assert "forward" not in vars(model)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("scope", [None, BlockRange(0), BlockRange(1), BlockRange(1, 1)], ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_blocks_may_write_to_what_they_are_given(scope, residual):
    model = Stack(InPlace(1.0), InPlace(2.0), InPlace(4.0))
    policies = [Interval(2), Threshold(0.5)] if scope == BlockRange(1) else [Interval(2)]
    for policy in policies:
        with attach(model, Recipe(policy, Taylor(0, residual)), scope=scope) as caching:
            for time in (1.0, 0.9, 0.8, 0.7):
                given = model(torch.ones(1, 4, 2), torch.tensor([time]))
                assert torch.equal(given[0], torch.full((1, 4, 2), 8.0))
            assert caching.cache.stats.skipped >= 2


@pytest.mark.usefixtures("registered")
def test_a_skipped_step_that_leaves_out_the_last_block_is_refused():
    """As a guidance does that skips layers."""
    model = Stack(InPlace(1.0), InPlace(2.0), InPlace(4.0))
    with attach(model, SCHEDULE) as caching:
        model(torch.ones(1, 4, 2), torch.tensor([0.9]))
        model.skipped = (2,)
        with pytest.raises(NotSupportedError, match=r"left it out.*`last` of the scope"):
            model(torch.ones(1, 4, 2), torch.tensor([0.8]))
        assert len(caching.cache.stats.steps) == 1
