"""Runs scenarios on a target."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from kvcache._checks import as_room, as_sizes

from .cold import measure_noise
from .judge import Judge, Outcome
from .operations import Script
from .report import Finding, Report, ScenarioResult
from .scenarios import SCENARIOS, Scenario
from .shrink import shrink
from .target import Target

Step = Callable[[str], None]


def verify(
    target: Target,
    *,
    runs: int = 10,
    seed: int = 0,
    scenarios: Iterable[str] | None = None,
    first_only: bool = False,
    progress: Step | None = None,
) -> Report:
    """Compare the logits of generated conversations with cold runs of the same passes.

    target: the cache under test, with its model.
    runs: conversations of each scenario.
    seed: of the conversations; the same for the same report.
    scenarios: names in ``SCENARIOS``; None for all.
    first_only: whether to stop at the first fault.
    progress: called with the name of the scenario after each conversation.

    A scenario ends with the first fault, of which the shortest conversation is looked for.

    Raises: ValueError for an unknown scenario, or less than one run. What the target raises in a
        conversation is a finding; what it raises while noise is measured, is not caught.
    """
    [runs], seed = as_sizes(runs=runs), as_room(seed, "seed")
    chosen = choose(scenarios)
    noise = measure_noise(target, seed)
    judge = Judge(target, noise)
    report = Report(target.name, seed, noise.kernel, noise.chunking, noise.bound)
    for scenario in chosen:
        started = time.perf_counter()
        result = _run(judge, scenario, runs, seed, progress or _quiet)
        result.seconds = time.perf_counter() - started
        report.results.append(result)
        if first_only and not report.passed:
            break
    return report


def verify_reuse(
    target: Target,
    runs: int = 10,
    seed: int = 0,
    scenarios: Iterable[str] | None = None,
) -> Report:
    """Raise AssertionError with the report if :func:`verify` finds a fault; return it otherwise.

    For tests::

        def test_my_cache():
            verify_reuse(MyTarget(), runs=20)
    """
    report = verify(target, runs=runs, seed=seed, scenarios=scenarios)
    if not report.passed:
        raise AssertionError(report.to_text())
    return report


def choose(names: Iterable[str] | None) -> list[Scenario]:
    """Return the scenarios of these names, all for None. Raises: ValueError for an unknown one."""
    wanted = list(SCENARIOS) if names is None else list(names)
    unknown = [name for name in wanted if name not in SCENARIOS]
    if unknown:
        raise ValueError(f"scenarios are {', '.join(SCENARIOS)}; got {unknown[0]!r}.")
    return [SCENARIOS[name] for name in wanted]


def _run(judge: Judge, scenario: Scenario, runs: int, seed: int, step: Step) -> ScenarioResult:
    result = ScenarioResult(scenario.name)
    if lacks := scenario.missing(judge.target):
        result.verdict, result.reason = "not supported", lacks
        return result
    for number in range(runs):
        script = scenario.script(judge.target, seed, number)
        outcome = judge.outcome(script)
        step(scenario.name)
        result.runs += 1
        result.equal += outcome.kind == "equal"
        result.compared += outcome.compared
        result.reused += outcome.reused
        result.refused += outcome.refused
        result.largest = max(result.largest, outcome.largest)
        result.worsen(outcome.kind)
        if not outcome.good:
            result.finding = _find(judge, script, outcome, number)
            break
    return result


def _find(judge: Judge, script: Script, outcome: Outcome, run: int) -> Finding:
    """Return the finding with the shortest script that ends like `outcome`."""
    shortest = shrink(script, lambda smaller: outcome.resembles(judge.outcome(smaller)))
    shown = judge.outcome(shortest)
    layer = None
    if shown.divergence is not None:
        layer = judge.first_layer(shortest, shown.divergence)
    return Finding(run, shortest, shown.divergence, shown.message, layer)


def _quiet(_: str) -> None:
    """Report no progress."""
