"""Attention of a decode pass: everyone computes the same, and the report says who paid how much."""

import io
from functools import cache

import numpy as np
import pytest

import kvcache
from kvcache.bench import AttendReport, AttendTiming, run_attend
from kvcache.bench.attend import contestants
from kvcache.bench.attend.case import ATTEND, IDEAL, LOADS, PROGRAM, RANGE, AttendCase
from kvcache.bench.attend.contestants import DecodePass, factories, ideal
from kvcache.bench.frameworks import framework_of
from kvcache.bench.harness.contest import UnavailableError

from ... import peek

BATCH_PEER = "mlx-lm BatchKVCache"
TINY = {"tokens": 40, "heads": 2, "query_heads": 4, "head_dim": 8}
# JAX compiles the ideal of every load.
QUICK = ("numpy", "torch", pytest.param("jax", marks=pytest.mark.matrix), "mlx")


@pytest.fixture(params=QUICK)
def backend(request):
    return kvcache.get_backend(request.param)


def case_of(backend, load, sequences=3, dtype="float32"):
    return AttendCase(backend, dtype, batch=sequences, load=load, **TINY)


def expected(case):
    """The outputs of a pass in float64, sequence by sequence."""
    q, group = case.queries().astype(np.float64), case.query_heads // case.heads
    outputs = np.empty(q.shape)
    for sequence, length in enumerate(case.lengths):
        rows = case.rows(sequence, max(0, length - (case.window or length)), length)
        for head in range(case.query_heads):
            keys = rows[head // group].astype(np.float64)
            weights = np.exp(keys @ q[head, sequence] * case.head_dim**-0.5)
            outputs[head, sequence] = weights / weights.sum() @ keys
    return outputs


@pytest.mark.parametrize("load", LOADS)
def test_everyone_computes_the_same(backend, load):
    case, framework = case_of(backend, load), framework_of(backend)
    with framework.scope():
        decode = DecodePass(framework, case)
        attend = {
            IDEAL: ideal(framework, case),
            ATTEND: decode.attend,
            RANGE: decode.by_range(),
            PROGRAM: DecodePass(framework, case).by_program(),
        }
        outputs = {name: backend.to_host(compute()) for name, compute in attend.items()}
    for output in outputs.values():
        np.testing.assert_allclose(output, expected(case), atol=3e-6)


@pytest.mark.matrix
@pytest.mark.one_backend(name="jax")
def test_attention_is_compiled_where_the_framework_compiles():
    case = case_of(kvcache.get_backend("jax"), "even")
    assert PROGRAM in factories(framework_of(case.backend))


@pytest.mark.parametrize("load", ["uneven", "even", "shared"])
def test_the_batch_cache_of_mlx_lm_computes_the_same(load, monkeypatch):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx

    case = case_of(kvcache.get_backend("mlx"), load)
    outputs = []
    peer = factories(framework_of(case.backend))[BATCH_PEER](case)
    monkeypatch.setattr(mx, "eval", outputs.append)
    peer.run(1)
    (output,) = outputs
    np.testing.assert_allclose(
        np.asarray(output)[:, :, 0].swapaxes(0, 1), expected(case), atol=3e-6
    )


@pytest.mark.parametrize("load", ["uneven", "even", "shared"])
def test_continuous_batching_of_transformers_computes_the_same(load):
    pytest.importorskip("transformers")
    from kvcache.bench.frameworks.continuous import decode_pass

    case = case_of(kvcache.get_backend("torch"), load)
    rows = [case.rows(number, 0, length) for number, length in enumerate(case.lengths)]
    attend = decode_pass(case, case.queries(), rows)
    for _ in range(2):  # a pass that is repeated writes the same
        np.testing.assert_allclose(attend()[0].numpy().swapaxes(0, 1), expected(case), atol=3e-6)


def test_mlx_lm_has_no_window():
    pytest.importorskip("mlx_lm")
    case = case_of(kvcache.get_backend("mlx"), "window")
    with pytest.raises(UnavailableError, match="no window"):
        factories(framework_of(case.backend))[BATCH_PEER](case)


def test_the_loads_lie_as_they_say():
    backend = kvcache.get_backend("numpy")
    framework = framework_of(backend)
    cells, lengths = {}, {}
    for load in LOADS:
        case = case_of(backend, load, sequences=4)
        table = peek.table(DecodePass(framework, case).cache)
        cells[load] = [table.cells_of(sequence) for sequence in range(4)]
        lengths[load] = case.lengths
    pieces = {load: [1 + (np.diff(row) != 1).sum() for row in rows] for load, rows in cells.items()}
    assert pieces["even"] == [1] * 4
    assert min(pieces["fragmented"]) >= 3
    assert max(row.size for row in cells["window"]) <= 11  # a quarter, and one to be dropped
    assert sorted(row.size for row in cells["uneven"]) == sorted(lengths["uneven"])
    assert len(set(lengths["uneven"])) == 4
    assert max(lengths["uneven"]) == 4 * 40
    assert all((row[:80] == cells["shared"][0][:80]).all() for row in cells["shared"])
    assert len({row[80] for row in cells["shared"]}) == 4


def test_a_range_of_too_many_scores_is_left_out(monkeypatch):
    monkeypatch.setattr(contestants, "_MOST_SCORES", 100)
    report = run_attend(["numpy"], loads=["even"], sequences=[3], rounds=1, **TINY)
    assert [timing.contestant for timing in report.timings] == [IDEAL, ATTEND]
    (skip,) = report.skipped
    assert (skip.contestant, skip.reason) == (RANGE, "3 tokens x 120 cells take seconds")


@cache
def measured():
    return run_attend(["numpy"], loads=["shared", "even"], sequences=[2, 1], rounds=2, **TINY)


def test_everyone_takes_part_everywhere():
    report = measured()
    places = [("even", 1), ("even", 2), ("shared", 1), ("shared", 2)]
    assert report.places == places
    by_name = report.contestants("numpy:cpu", "float32")
    assert list(by_name) == [IDEAL, ATTEND, RANGE]
    for timings in by_name.values():
        assert [timing.place for timing in timings] == places
        assert all(min(timing.rounds_us) > 0 for timing in timings)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"heads": 0}, "heads must be >= 1; got 0"),
        ({"rounds": 0}, "rounds must be >= 1; got 0"),
        ({"sequences": [0, 1]}, r"sequences are >= 1, with 8 tokens or more; got \[0, 1\] and 40"),
        ({"sequences": []}, "sequences are >= 1"),
        ({"tokens": 7}, "8 tokens or more"),
        ({"query_heads": 3}, "query_heads are a multiple of 2 heads; got 3"),
        ({"loads": ["odd"]}, r"loads are some of even, .*; got \['odd'\]"),
        ({"loads": []}, "loads are some of"),
    ],
)
def test_senseless_requests_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        run_attend(**{"backends": ["numpy"], "sequences": [1], **TINY, **wrong})


def test_progress_counts_to_the_end():
    seen = []
    run_attend(
        ["numpy"],
        loads=["even"],
        sequences=[2, 1],
        rounds=1,
        progress=lambda *what: seen.append(what),
        **TINY,
    )
    labels = ["numpy:cpu float32 even 1"] * 2 + ["numpy:cpu float32 even 2"] * 2
    assert seen == [(i + 1, 4, label) for i, label in enumerate(labels)]


def test_a_report_survives_its_file(tmp_path):
    measured().to_json(tmp_path / "report.json")
    assert AttendReport.from_json(tmp_path / "report.json") == measured()


def made_of(*figures):
    """A report of ``(backend, load, sequences, contestant, microseconds)``."""
    timings = tuple(
        AttendTiming(backend, "float32", load, sequences, name, 1, (us,))
        for backend, load, sequences, name, us in figures
    )
    return AttendReport(1024, 8, 32, 128, 1, "a machine", {}, timings)


def test_the_worst_number_of_sequences_counts():
    report = made_of(
        ("torch:cpu", "even", 1, IDEAL, 10.0),
        ("torch:cpu", "even", 1, ATTEND, 11.0),
        ("torch:cpu", "even", 32, IDEAL, 100.0),
        ("torch:cpu", "even", 32, ATTEND, 130.0),
        ("torch:cpu", "shared", 8, IDEAL, 100.0),
        ("torch:cpu", "shared", 8, ATTEND, 100.0),
        ("torch:cpu", "shared", 32, IDEAL, 100.0),
        ("torch:cpu", "shared", 32, ATTEND, 25.0),
        ("jax:cpu", "even", 32, IDEAL, 100.0),
        ("jax:cpu", "even", 32, ATTEND, 150.0),
        ("jax:cpu", "even", 32, PROGRAM, 130.0),
    )
    judged = [(v.heading, v.rule, v.at, v.measured, v.passed) for v in report.verdicts]
    assert judged == [
        ("torch:cpu float32", "attend / ideal", "even, 32", 1.3, False),
        ("torch:cpu float32", "ideal / attend", "shared, 32", 4.0, True),
        ("jax:cpu float32", "attend, compiled / ideal", "even, 32", 1.3, True),
    ]


def test_the_table_shows_multiples_of_the_ideal_in_80_columns():
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    report = made_of(
        ("mlx:cpu", "uneven", 256, IDEAL, 20_000.0),
        ("mlx:cpu", "uneven", 256, ATTEND, 30_000.0),
        ("mlx:cpu", "uneven", 256, "mlx-lm BatchKVCache", 90_000.0),
        ("numpy:cpu", "even", 1, IDEAL, 10.0),
        ("numpy:cpu", "even", 1, RANGE, 25.0),
    )
    console.print(report.to_table())
    text = console.file.getvalue()
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["uneven,", "256", "20k", "1.50", "4.50"] in rows
    assert ["even,", "1", "10.0", "2.50"] in rows


@pytest.mark.installation
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_written(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"report.{suffix}"
    measured().plot(path)
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


def test_a_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="this report has none"):
        made_of().plot(tmp_path / "report.png")
