"""Recipes are measured against the run without a cache, and judged against those of others."""

import io

import numpy as np
import pytest

import kvcache
from kvcache.bench import DiffusionReport, DiffusionTiming, run_diffusion, toy_model
from kvcache.bench.diffusion.recipes import Sampler, Uncached, trials
from kvcache.bench.diffusion.report import UNCACHED
from kvcache.bench.diffusion.run import ONE_PROGRAM, calibrated, relative_error
from kvcache.diffusion import DiffusionCache, Interval, Recipe
from kvcache.reference.dit.model import DiT, DiTConfig

TINY = DiTConfig(tokens=8, width=16, heads=2, blocks=3)
STEPS = 8


@pytest.fixture(scope="module")
def model():
    return DiT.random(TINY, kvcache.get_backend("numpy"))


@pytest.fixture(scope="module")
def report(model):
    return run_diffusion(model, ["numpy"], steps=STEPS, samples=2, rounds=2, peers=False)


def sampler(model, spec="numpy"):
    return Sampler(model, kvcache.get_backend(spec), np.array([1, 2]), STEPS)


def timing(family, us, *, ours=True, **more):
    figures = {"skipped": 0.0, "error": 0.0, "quality": None, **more}
    return DiffusionTiming("here", family, "", rounds_us=(us,), ours=ours, **figures)


def reported(*timings):
    return DiffusionReport(28, 2, 1, "a machine", {}, (timing(UNCACHED, 100.0), *timings))


def test_every_recipe_is_measured(model, report):
    compared = trials(STEPS, calibrated(sampler(model)))
    names = [(timing.family, timing.setting) for timing in report.timings]
    assert names == [(UNCACHED, ""), *((trial.family, trial.setting) for trial in compared)]
    assert len(set(names)) == len(names)
    assert all(len(timing.rounds_us) == 2 for timing in report.timings)
    assert report.timings[0].skipped == report.timings[0].error == 0


def test_who_skips_is_off_and_who_does_not_is_not(report):
    assert any(timing.skipped for timing in report.timings)
    for timing in report.timings:
        assert (timing.error > 1e-6) == (timing.skipped > 0), timing.family
        assert 0 <= timing.quality <= 1


def test_shares_of_blocks_are_what_ran(model, report):
    """Counts the blocks that run, whatever the caches say."""
    shot = sampler(model)
    ran = 0

    def counting(block):
        def count(*arguments):
            nonlocal ran
            ran += 1
            return block(*arguments)

        return count

    shot._blocks = [counting(block) for block in shot._blocks]
    for trial in trials(STEPS, calibrated(sampler(model))):
        if trial.scope is not None:
            ran = 0
            shot.run(DiffusionCache(trial.recipe), trial.scope)
            [entry] = [
                t for t in report.timings if (t.family, t.setting) == (trial.family, trial.setting)
            ]
            assert entry.skipped == pytest.approx(1 - ran / (STEPS * TINY.blocks))


def test_samplers_agree_with_and_without_an_idle_cache(model):
    shot = sampler(model)
    exact = shot.run(Uncached(), None)
    for trial in trials(STEPS, calibrated(shot)):
        idle = DiffusionCache(Recipe(Interval(1)))
        assert relative_error(shot.run(idle, trial.scope), exact) < 1e-6
    assert relative_error(2 * exact, exact) == pytest.approx(1)


@pytest.mark.one_backend(name="jax")
def test_one_program_skips_as_many(model):
    pytest.importorskip("jax")
    from kvcache.bench.diffusion.program import program

    shot = sampler(model, "jax")
    exact, none = program(shot, None)()
    assert none == 0
    compiled = [t for t in trials(STEPS, calibrated(shot)) if t.family in ONE_PROGRAM]
    for trial in (compiled[1], compiled[-1]):
        cache = DiffusionCache(trial.recipe)
        eager = shot.run(cache, trial.scope)
        drawn, skipped = program(shot, trial)()
        assert skipped == cache.stats.skip_rate > 0
        assert relative_error(drawn, eager) < 1e-4 < relative_error(drawn, exact)


def test_too_few_steps_are_refused(model):
    with pytest.raises(ValueError, match="steps >= 6"):
        run_diffusion(model, ["numpy"], steps=5)


def test_time_saved():
    report = reported(timing("a", 25.0), timing("b", 120.0))
    assert [report.saved(timing) for timing in report.timings] == [0, 0.75, pytest.approx(-0.2)]


def test_others_are_met_by_ours_at_no_greater_error():
    theirs = timing("theirs", 60.0, ours=False, skipped=0.5, error=0.1)
    good = timing("good", 50.0, skipped=0.5, error=0.1)
    careless = timing("careless", 10.0, skipped=0.9, error=0.2)
    careful = timing("careful", 55.0, skipped=0.4, error=0.01)
    met = reported(theirs, good, careless, careful).verdicts
    assert [(v.rule, v.measured, v.passed) for v in met] == [
        ("% of work saved", 50, True),
        ("% of time saved", 50, True),
    ]
    missed = reported(theirs, careless, careful).verdicts
    assert [(v.measured, v.passed) for v in missed] == [
        (40, False),
        (pytest.approx(45), True),
    ]
    assert [v.passed for v in reported(theirs).verdicts] == [False, False]
    assert not reported(good).verdicts


def test_report_round_trips_and_prints(report, tmp_path):
    path = tmp_path / "it.json"
    report.to_json(path)
    assert DiffusionReport.from_json(path) == report
    console = pytest.importorskip("rich.console")
    text = io.StringIO()
    console.Console(file=text, width=100).print(report.to_table())
    assert "TeaCache" in text.getvalue()
    assert "uncached" in text.getvalue()


def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "it.svg"
    report.plot(path)
    assert "TeaCache" in path.read_text()
    with pytest.raises(ValueError, match="needs timings"):
        DiffusionReport(28, 2, 1, "", {}).plot(path)


def test_a_model_is_read_where_it_was_kept(model, tmp_path):
    path = tmp_path / "toy.safetensors"
    model.save(path)
    assert toy_model(path).config == TINY


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_beside_the_caches_of_diffusers(monkeypatch):
    """Where the rule is the same, so are work and error."""
    pytest.importorskip("diffusers")
    from kvcache.bench.diffusion import peers as _diffusers

    everyone = _diffusers.contenders
    chosen = (UNCACHED, "FirstBlockCache", "Threshold B1, hold", "MagCache", "TaylorSeer 1, lite")

    def some(ratios):
        return [contender for contender in everyone(ratios) if contender.family in chosen]

    monkeypatch.setattr(_diffusers, "contenders", some)
    timings = tuple(_diffusers.compare(rounds=1, side=2, steps=10))
    report = DiffusionReport(12, 1, 1, "", {}, timings)
    by_name = {f"{t.family} {t.setting}": t for t in timings}
    for setting in (0.1, 0.2, 0.4):
        theirs = by_name[f"FirstBlockCache {setting}"]
        same = by_name[f"Threshold B1, hold {setting}"]
        assert same.skipped == pytest.approx(theirs.skipped, abs=1e-3)
        assert same.error == pytest.approx(theirs.error, rel=1e-3)
    assert any(t.skipped > 0.3 for t in timings if not t.ours)
    work = [v for v in report.verdicts if v.rule == "% of work saved"]
    assert len(work) == sum(not t.ours for t in timings)


def test_without_diffusers_it_says_so(model, monkeypatch):
    monkeypatch.setattr("kvcache.bench.diffusion.run.find_spec", lambda name: None)
    report = run_diffusion(model, ["numpy"], steps=STEPS, samples=1, rounds=1)
    assert [skip.reason for skip in report.skipped] == ["it needs pip install 'kvcache[diffusers]'"]
