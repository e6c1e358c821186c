"""The bench itself: what it compares, what it reports, and what it says of targets that cannot."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kvcache.errors import NotSupportedError
from kvcache.testing import verify_reuse
from kvcache.verify import SCENARIOS, Ability, Conversation, Target, Trial, verify
from kvcache.verify.compare import difference, differences
from kvcache.verify.operations import Begin, Cancel, Draft, End, Evict, Feed, Fork, Together, Trim
from kvcache.verify.play import play
from kvcache.verify.report import junit
from kvcache.verify.shrink import shrink

from .faults import SinksDropped
from .tiny import FULL, KEEP, RING, Tiny, reference


class Bare(Target):
    """A target that computes, and does nothing else: every pass from the beginning."""

    name, vocab_size, max_tokens = "bare", 24, 30

    def __init__(self, weights):
        self.weights = weights

    def trial(self):
        return BareTrial(self)


class BareTrial(Trial):
    def __init__(self, target):
        self.target = target

    def begin(self, ids, tenant=0):
        return BareConversation(self.target)


class BareConversation(Conversation):
    held = 0

    def __init__(self, target):
        self.target, self.ids = target, []

    def forward(self, ids):
        self.ids += ids
        return reference(self.target.weights, self.ids)[0][-len(ids) :]


@pytest.fixture(scope="module")
def bare():
    return Bare(Tiny().weights)


def test_what_a_target_cannot_do_is_reported(bare):
    report = verify(bare, runs=1)
    assert [result.scenario for result in report.results] == [*SCENARIOS]
    verdicts = {result.scenario: result.verdict for result in report.results}
    needy = {name for name, scenario in SCENARIOS.items() if scenario.needs or scenario.tier}
    assert {name for name, verdict in verdicts.items() if verdict == "not supported"} == needy
    assert "tenants          not supported  the target lacks: reuse, tenants" in report.to_text()
    assert report.passed
    assert report.kernel_noise is None


ABSENT = {
    "trim": lambda conversation: conversation.trim(1),
    "draft": lambda conversation: conversation.draft([1], 0),
    "fork": lambda conversation: conversation.fork(),
    "cancel": lambda conversation: conversation.cancel([1], 0),
}


@pytest.mark.parametrize("name", ABSENT)
def test_an_ability_is_declared_or_refused(bare, name):
    with bare.trial() as trial, pytest.raises(NotSupportedError, match=f"does not {name}"):
        ABSENT[name](trial.begin([1]))


def test_a_trial_refuses_what_it_lacks(bare):
    with bare.trial() as trial:
        with pytest.raises(NotSupportedError, match="does not batch"):
            trial.together([(trial.begin([1]), [2])])
        with pytest.raises(NotSupportedError, match="no tier 'host'"):
            trial.evict("host")
    with pytest.raises(NotSupportedError, match="does not reference"):
        bare.reference([1])
    with pytest.raises(NotSupportedError, match="does not layers"), bare.layers():
        pass


def broken():
    """A target that is wrong in passes of several tokens only."""
    return SinksDropped((FULL, RING), KEEP)


def test_equal_seeds_give_equal_reports():
    def seen(seed):
        report = verify(broken(), runs=2, seed=seed, scenarios=["ones", "fives", "mixed"])
        for result in report.results:
            result.seconds = 0
        return report.to_json()

    assert seen(1) == seen(1)
    assert seen(1) != seen(2)


def test_verify_reuse_raises_with_the_report():
    with pytest.raises(AssertionError, match=r"(?s)fives +different.*Begin\(slot=0"):
        verify_reuse(broken(), scenarios=["fives"])


def test_arguments():
    with pytest.raises(ValueError, match=r"scenarios are at-once, .*; got 'no'"):
        verify(Tiny(), scenarios=["no"])
    with pytest.raises(ValueError, match="runs"):
        verify(Tiny(), runs=0)
    with pytest.raises(ValueError, match="seed"):
        verify(Tiny(), seed=-1)


def test_progress_is_told_after_each_conversation():
    steps = []
    verify(Tiny(), runs=2, scenarios=["ones", "forks"], progress=steps.append)
    assert steps == ["ones", "ones", "forks", "forks"]


class Failing(Tiny):
    """Raises when a state is restored."""

    def restored(self, caches):
        raise RuntimeError("no such page: lost")


def test_a_cache_that_raises_has_failed():
    report = verify(Failing(), runs=4, scenarios=["returns", "ones"])
    returns, ones = report.results
    assert (returns.verdict, ones.verdict) == ("failed", "equal")
    assert returns.finding.summary.endswith("RuntimeError: no such page: lost")
    assert len(returns.finding.script) == 2


class FailingCold(Tiny):
    """Raises in cold runs of two passes, of which noise needs none."""

    def cold(self, chunks):
        if len(chunks) == 2:
            raise RuntimeError("out of memory")
        return super().cold(chunks)


def test_a_cold_run_that_raises_has_failed():
    [result] = verify(FailingCold(), runs=1, scenarios=["at-once"]).results
    assert result.verdict == "failed"
    assert result.finding.message == "a cold run of the same passes: RuntimeError: out of memory"


class WideNoise(Tiny):
    """Rounds by the length of a pass, as kernels do."""

    def cold(self, chunks):
        return [rows * np.float32(1 + 1e-6 * (len(rows) > 1)) for rows in super().cold(chunks)]


def test_noise_is_no_fault_and_is_told():
    report = verify(WideNoise(), runs=3, scenarios=["fives", "returns"])
    assert {result.verdict for result in report.results} == {"within noise"}
    assert 0 < report.chunking_noise < report.bound < 1e-3
    assert all(0 < result.largest < report.bound for result in report.results)
    assert "largest difference" in report.to_text()


# Reports.


@pytest.fixture(scope="module")
def report():
    target = broken()
    target.tiers = ("device", "host")
    return verify(target, scenarios=["ones", "fives", "evicted-store"])


def test_json(report):
    content = json.loads(report.to_json())
    assert content["passed"] is False
    assert [result["verdict"] for result in content["results"]] == [
        "equal",
        "different",
        "not supported",
    ]
    finding = content["results"][1]["finding"]
    script = [eval(line) for line in finding["script"]]  # lines of Python, to be run again
    assert tuple(script) == report.results[1].finding.script
    assert finding["divergence"]["against"] == "run without a cache"
    assert finding["layer"] == 1


def test_junit(report):
    suite = ET.fromstring(junit([report]))[0]
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "3", "failures": "1", "errors": "0", "skipped": "1"}
    ones, fives, store = suite
    assert [case.get("name") for case in suite] == ["ones", "fives", "evicted-store"]
    assert len(ones) == 0
    assert "logits differ by" in fives.find("failure").get("message")
    assert fives.find("failure").text.startswith("Begin(slot=0")
    assert store.find("skipped").get("message") == "the target lacks: tier store"
    assert report.to_junit() == junit([report])


# Differences.

ROWS = np.array([[1.0, 2.0], [3.0, 4.0]])


def test_differences_by_row():
    other = ROWS + np.array([[0, 0.5], [0, 0]])
    assert differences(ROWS, other).tolist() == [0.5, 0]
    assert difference(ROWS, other) == 0.5
    assert difference(ROWS[:0], ROWS[:0]) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_differs(value):
    other = ROWS.copy()
    other[1, 0] = value
    assert differences(ROWS, other).tolist() == [0, np.inf]
    assert differences(other, other).tolist() == [0, 0]


def test_what_a_target_does_not_tell_is_left_out():
    other = ROWS.copy()
    other[1, 0] = np.nan
    assert difference(ROWS, other, partial=True) == 0
    other[1] = [3, np.nan]  # the likeliest token of the other row
    assert differences(ROWS, other, partial=True).tolist() == [0, np.inf]


# Scripts.


def test_operations_on_nothing_are_passed_over():
    script = (
        Feed(0, (1,)),
        Trim(0, 1),
        Draft(0, (1,), 1),
        Fork(0, 1),
        Cancel(0, (1,)),
        End(0),
        Together((0, 1), ((1,), (2,))),
        Begin(0, (), 1, 5),
        Begin(0, (1,)),
        Feed(0, (2,) * 50),
        Trim(0, 9),
    )
    played = play(Tiny(), script)
    assert played.failure is None
    assert [observation.ids for observation in played.observations] == [(1,)]


def test_a_prompt_is_made_of_earlier_ones():
    script = (Begin(0, (1, 2, 3, 4)), End(0), Begin(1, (9,), 0, 1, 2, sizes=(2,)), Evict("host"))
    observations = play(Tiny(), script).observations
    assert observations[-1].ids == (1, 9, 3, 4)
    assert [len(observation.logits) for observation in observations] == [4, 2, 2]
    assert observations[-1].candidates == (((1, 9), (3, 4)),)


def test_reused_tokens_are_computed_in_the_passes_that_computed_them():
    script = (Begin(0, (1, 2, 3, 4, 5), sizes=(3,)), End(0), Begin(1, (7,), 0, 5))
    [*_, last] = play(Tiny(), script).observations
    assert last.position == 4
    assert last.candidates == (((1, 2, 3), (4,), (5, 7)),)


def test_shrinking_ends_with_what_matters():
    script = tuple(Feed(0, tuple(range(n)), (2,)) for n in range(1, 9))
    tries = []

    def is_faulty(smaller):
        tries.append(smaller)
        return any(5 in operation.ids for operation in smaller)

    assert shrink(script, is_faulty) == (Feed(0, (5,)),)
    assert len(tries) == len(set(tries)) < 60


def test_shrinking_is_bounded():
    tries = []
    script = tuple(Feed(0, (n,)) for n in range(9))
    assert shrink(script, lambda smaller: bool(tries.append(smaller)), tries=5) == script
    assert len(tries) == 5


def test_abilities_are_all_needed_by_a_scenario():
    needed = {ability for scenario in SCENARIOS.values() for ability in scenario.needs}
    assert needed == set(Ability) - {Ability.REFERENCE, Ability.LAYERS}
