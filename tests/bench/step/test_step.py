"""A whole decode step: everyone writes the same tokens, and can go on for ever."""

import io
from functools import cache

import numpy as np
import pytest

import kvcache
from kvcache.bench import StepReport, StepTiming, run_step
from kvcache.bench.frameworks import framework_of
from kvcache.bench.harness.contest import RAW
from kvcache.bench.step.case import ATTEND, CAUSAL, PROGRAM, DecodeCase
from kvcache.bench.step.contestants import CausalSteps, ProgramSteps, eager

from ... import peek

TINY = {"tokens": 16, "layers": 2, "heads": 2, "head_dim": 4}


@cache
def measured(spec):
    return run_step([spec], batches=(2, 1), rounds=2, **TINY)


@pytest.fixture
def stepped(backend):
    return measured(backend.spec)


def case_of(backend, sequences, dtype="float32"):
    return DecodeCase(backend, dtype, tokens=16, batch=sequences, heads=2, head_dim=4, layers=2)


def test_everyone_takes_part_in_every_batch(backend, stepped):
    dtypes = [dtype for dtype in ("float32", "bfloat16") if dtype in backend.dtypes]
    assert stepped.groups == [(backend.spec, dtype) for dtype in dtypes]
    for group in stepped.groups:
        by_name = stepped.contestants(*group)
        assert list(by_name) == [RAW, CAUSAL]
        for timings in by_name.values():
            assert [timing.place for timing in timings] == [(1, 16), (2, 8)]
            assert all(1 <= timing.steps <= timing.tokens // 4 for timing in timings)
            assert all(min(timing.rounds_us) > 0 for timing in timings)


def test_as_a_program_with_and_without_the_write(backend):
    report = run_step([backend.spec], ["float32"], [2, 1], rounds=2, program=True, **TINY)
    by_name = report.contestants(backend.spec, "float32")
    assert list(by_name) == [ATTEND, PROGRAM]
    (alone, _), (both, _) = by_name.values()
    assert report.ratio(both, ATTEND) == pytest.approx(both.us / alone.us)


def test_the_write_is_what_the_two_programs_differ_in():
    case = case_of(kvcache.get_backend("numpy"), 2)
    written = {}
    for name in (ATTEND, PROGRAM):
        program = ProgramSteps(framework_of(case.backend), case, name)
        program.rewind(1)
        program.run(1)
        written[name] = [bool(keys[:, [15, 31]].all()) for keys, _ in program.state.values()]
        assert not any(keys[:, :15].any() for keys, _ in program.state.values())
    assert written == {ATTEND: [False] * 2, PROGRAM: [True] * 2}


def test_a_dtype_the_framework_lacks_is_skipped_once_with_the_reason():
    pytest.importorskip("array_api_strict")
    report = run_step(
        ["array_api:array_api_strict"], ["bfloat16"], batches=[1, 2], rounds=1, **TINY
    )
    assert not report.timings
    (skip,) = report.skipped
    assert (skip.dtype, skip.contestant) == ("bfloat16", "")


@pytest.mark.parametrize("sequences", [1, 3])
def test_steps_can_be_repeated_without_end(backend, sequences):
    case, framework = case_of(backend, sequences), framework_of(backend)
    with framework.scope():
        contestants = [make(case) for make in eager(framework).values()]
        for contestant in contestants:
            for steps in (1, 6, 6, 3, 6):
                contestant.rewind(steps)
                contestant.run(steps)


@pytest.mark.parametrize("sequences", [1, 3])
def test_our_sequences_are_full_after_every_block(sequences):
    case = case_of(kvcache.get_backend("numpy"), sequences)
    causal = CausalSteps(framework_of(case.backend), case)
    table = peek.table(causal.cache)
    contestant = causal.contestant()
    assert table.free == 0
    for steps in (1, 6, 3):
        contestant.rewind(steps)
        assert table.free == steps * sequences
        contestant.run(steps)
        assert (table.free, causal.position) == (0, 16)


@pytest.mark.parametrize("sequences", [1, 3])
def test_everyone_writes_the_last_tokens_of_all_layers(backend, sequences):
    """Filled with zeros, 3 steps of ones: every array ends as the others do, token by token."""
    case, framework = case_of(backend, sequences), framework_of(backend)
    sums = {}
    with framework.scope():
        histories = case.histories()
        framework.raw_step(case, histories)(3)
        sums[RAW] = [
            np.asarray(backend.to_host(array)).sum(axis=(1, 3)).ravel()
            for pair in histories
            for array in pair
        ]
        causal = CausalSteps(framework, case)
        causal.rewind(3)
        causal.run(3)
        table = peek.table(causal.cache)
        cells = np.concatenate([table.cells_of(sequence) for sequence in causal.sequences])
        sums[CAUSAL] = [
            np.asarray(backend.to_host(array)).sum(axis=(0, 2))[cells]
            for pair in peek.layers(causal.cache).values()
            for array in pair
        ]
    assert [len(arrays) for arrays in sums.values()] == [4, 4]
    expected = np.tile([0.0] * 13 + [8.0] * 3, sequences)
    for array in sums[RAW] + sums[CAUSAL]:
        np.testing.assert_array_equal(array, expected)


def test_our_step_takes_the_mask_of_every_sequence(monkeypatch):
    case = case_of(kvcache.get_backend("numpy"), 3)
    framework, seen = framework_of(case.backend), []
    monkeypatch.setattr(type(framework), "finish", lambda _, arrays: seen.append(arrays))
    causal = CausalSteps(framework, case)
    causal.rewind(1)
    causal.run(1)
    (arrays,) = seen
    masks = arrays[2::3]
    assert len(arrays) == 3 * case.layers
    assert all(mask is masks[0] for mask in masks)
    assert masks[0].sum(axis=1).tolist() == [16, 16, 16]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"layers": 0}, "layers must be >= 1; got 0"),
        ({"rounds": 0}, "rounds must be >= 1; got 0"),
        ({"batches": [0, 1]}, "batches are >= 1, with 4 tokens for each sequence"),
        ({"batches": [5]}, r"4 tokens for each sequence; got \[5\] and 16"),
        ({"batches": []}, "batches are >= 1"),
    ],
)
def test_senseless_requests_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        run_step(**{"backends": ["numpy"], "batches": [1], **TINY, **wrong})


def test_an_unknown_dtype_is_refused():
    with pytest.raises(kvcache.DTypeError, match="got 'float33'"):
        run_step(["numpy"], ["float33"], **TINY)


def test_progress_counts_to_the_end():
    seen = []
    run_step(
        ["numpy"],
        ["float32"],
        batches=[2, 1],
        rounds=1,
        progress=lambda *what: seen.append(what),
        **TINY,
    )
    labels = ["numpy:cpu float32 1 x 16"] * 2 + ["numpy:cpu float32 2 x 8"] * 2
    assert seen == [(i + 1, 4, label) for i, label in enumerate(labels)]


def test_a_report_survives_its_file(stepped, tmp_path):
    stepped.to_json(tmp_path / "report.json")
    assert StepReport.from_json(tmp_path / "report.json") == stepped


def test_the_table_shows_ratios_to_raw_in_80_columns():
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    timings = tuple(
        StepTiming("numpy:cpu", "float32", sequences, 8192 // sequences, name, 8, (us,))
        for sequences, name, us in [
            (8, RAW, 50.0),
            (8, CAUSAL, 125.0),
            (1, RAW, 20.0),
            (1, CAUSAL, 30.0),
            (1, "another", 40.0),
        ]
    )
    report = StepReport(32, 8, 128, 1, "a machine", {"numpy": "2.0"}, timings)
    console.print(report.to_table())
    text = console.file.getvalue()
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    assert "1 x 8,192 x raw 8 x 1,024 x raw".split() in rows
    assert ["raw", "20.0", "50.0"] in rows
    assert ["CausalCache", "30.0", "1.50", "125", "2.50"] in rows
    assert ["another", "40.0", "2.00"] in rows
    assert not report.verdicts
