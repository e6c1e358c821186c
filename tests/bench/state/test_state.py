"""Recurrent states: everyone holds the same, and the figures are compared with the right ones."""

import io
from functools import cache

import numpy as np
import pytest

import kvcache
from kvcache.bench import StateReport, StateTiming, run_state
from kvcache.bench.frameworks import framework_of
from kvcache.bench.harness.contest import RAW, UnavailableError
from kvcache.bench.state.case import (
    ADVANCE,
    FORK,
    POOL,
    RAW_COPIES,
    RAW_HOST,
    RESTORE,
    StateCase,
)
from kvcache.bench.state.contestants import PoolSteps, factories

TINY = {"layers": 2, "heads": 2, "head_dim": 4, "channels": 6, "kernel": 3}


@cache
def measured(spec):
    return run_state([spec], batches=(3, 1), rounds=2, **TINY)


def case_of(backend, batch):
    return StateCase(backend, "float32", tokens=64, batch=batch, **TINY)


def test_everyone_takes_part_or_says_why(backend):
    report = measured(backend.spec)
    assert report.groups == [(backend.spec, "float32")]
    by_name = report.contestants(backend.spec, "float32")
    absent = {skip.contestant for skip in report.skipped}
    everyone = {RAW_COPIES, ADVANCE, RAW, POOL, FORK, RAW_HOST, RESTORE}
    assert {*by_name} | absent == everyone
    assert absent <= {RAW_COPIES, RAW}
    for timings in by_name.values():
        assert [timing.place for timing in timings] == [1, 3]
        assert all(min(timing.rounds_us) > 0 for timing in timings)


def test_steps_can_be_repeated_without_end(backend):
    case, framework = case_of(backend, 2), framework_of(backend)
    with framework.scope():
        for make in factories(framework).values():
            try:
                contestant = make(case)
            except UnavailableError:
                continue
            for steps in (1, 6, 3):
                contestant.rewind(steps)
                contestant.run(steps)


def test_ours_and_raw_hold_the_new_states_of_all_layers(backend):
    """Filled with zeros, steps of ones: half of the raw rows, and one slot of ours each."""
    case, framework = case_of(backend, 3), framework_of(backend)
    if backend.name == "array_api":
        pytest.skip("the standard has no assignment by an index array")
    with framework.scope():
        layers = [case.buffers(6) for _ in range(case.layers)]
        framework.raw_states(layers, case.states(), [0, 1, 2], [3, 4, 5])(1)
        ours = PoolSteps(framework, case)
        ours.run(3)
    for buffers in layers:
        for buffer in buffers:
            rows = np.asarray(backend.to_host(buffer), np.float32).reshape(6, -1)
            assert rows.min(1).tolist() == [0, 0, 0, 1, 1, 1]
    for sequence in range(3):
        with ours.cache.snapshot(sequence) as snapshot:
            [part] = snapshot.parts
            assert part.rows.positions.tolist() == [2]
            content = part.rows.content()
            assert sorted(content) == [*range(case.layers)]
            assert all((a.data == 1).all() for arrays in content.values() for a in arrays)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"layers": 0}, "layers must be >= 1; got 0"),
        ({"rounds": 0}, "rounds must be >= 1; got 0"),
        ({"batches": [0, 1]}, r"batches are >= 1; got \[0, 1\]"),
        ({"batches": []}, "batches are >= 1"),
        ({"kernel": 1}, "kernel must be >= 2: it holds one input fewer; got 1"),
    ],
)
def test_senseless_requests_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        run_state(**{"backends": ["numpy"], "batches": [1], **TINY, **wrong})


def test_an_unknown_dtype_is_refused():
    with pytest.raises(kvcache.DTypeError, match="got 'float33'"):
        run_state(["numpy"], ["float33"], **TINY)


def test_progress_counts_to_the_end():
    seen = []
    run_state(["numpy"], batches=[2, 1], rounds=1, progress=lambda *what: seen.append(what), **TINY)
    labels = ["numpy:cpu float32 1"] * 2 + ["numpy:cpu float32 2"] * 2
    assert seen == [(i + 1, 4, label) for i, label in enumerate(labels)]


def test_a_report_survives_its_file(backend, tmp_path):
    report = measured(backend.spec)
    report.to_json(tmp_path / "report.json")
    assert StateReport.from_json(tmp_path / "report.json") == report


def test_the_table_shows_ratios_and_targets_in_80_columns():
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    timings = tuple(
        StateTiming("numpy:cpu", "float32", sequences, name, 8, (us,))
        for sequences, name, us in [
            (1, RAW_COPIES, 10.0),
            (1, ADVANCE, 11.0),
            (1, RAW, 20.0),
            (1, POOL, 30.0),
            (1, FORK, 4.0),
            (8, RAW, 50.0),
            (8, POOL, 55.0),
        ]
    )
    report = StateReport(4, 32, 128, 8192, 4, 1, "a machine", {"numpy": "2.0"}, timings)
    console.print(report.to_table())
    text = console.file.getvalue()
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["StateCache.advance", "11.0", "1.10"] in rows
    assert ["RecurrentCache", "30.0", "1.50", "55.0", "1.10"] in rows
    assert ["copy_prefix", "4.00"] in rows
    assert [(v.rule, v.at, v.passed) for v in report.verdicts] == [
        ("StateCache.advance / raw copies", "1 sequences", True),
        ("RecurrentCache / raw", "1 sequences", False),
    ]
