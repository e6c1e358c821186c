"""Planning is measured in a steady state, and judged by bounds that are known."""

import io

import pytest

import kvcache
from kvcache.bench import LOADS, Load, PlanReport, PlanTiming, run_plan
from kvcache.bench.plan import run as planning
from kvcache.bench.plan.run import PlannedPool

from ... import peek

SMALL = (Load(1, 32, 30), Load(3, 16, 12))
WINDOW = 4


@pytest.fixture(scope="module")
def planned():
    return run_plan(SMALL, WINDOW, rounds=2)


def occupancy(pool):
    """Returns how many cells are free, and how many each sequence holds."""
    table = peek.table(pool.cache)
    return table.free, [table.cells_of(sequence).size for sequence in pool.sequences]


def test_every_load_is_planned_with_and_without_window_mask_and_larger_pool(planned):
    assert planned.loads == list(SMALL)
    for load in SMALL:
        for window in (None, WINDOW):
            for pool in (1, planning.LARGER):
                for mask in (False, True):
                    timing = planned.find(load, window, pool, mask)
                    assert timing is not None
                    assert len(timing.rounds_us) == 2
                    assert min(timing.rounds_us) > 0
    assert len(planned.timings) == len(SMALL) * 8


@pytest.mark.parametrize("load", [*SMALL, Load(2, 3000, 2500)], ids=lambda load: load.label)
@pytest.mark.parametrize("pool", [1, planning.LARGER])
@pytest.mark.parametrize("mask", [False, True])
def test_a_pool_without_a_window_goes_back_to_where_it_was(load, pool, mask):
    filled = PlannedPool(load, None, pool, mask)
    cells = load.sequences * pool * load.capacity
    full = cells - load.sequences * load.used, [load.used] * load.sequences
    contestant = filled.contestant()
    assert occupancy(filled) == full
    for steps in (1, 5, 5, 2):
        contestant.rewind(steps)
        contestant.run(steps)
        assert occupancy(filled) == full
    contestant.rewind(3)
    assert occupancy(filled)[1] == [load.used - 3] * load.sequences


@pytest.mark.parametrize("load", SMALL, ids=lambda load: load.label)
@pytest.mark.parametrize("pool", [1, planning.LARGER])
@pytest.mark.parametrize("mask", [False, True])
def test_a_pool_with_a_window_evicts_as_many_as_it_adds(load, pool, mask):
    filled = PlannedPool(load, WINDOW, pool, mask)
    contestant = filled.contestant()
    contestant.run(1)
    steady = occupancy(filled)
    several = load.sequences * pool > 1
    assert steady[1] == [WINDOW + several] * load.sequences
    for steps in (1, 5, 40, 2):
        contestant.rewind(steps)
        contestant.run(steps)
        assert occupancy(filled) == steady
    assert filled.position == load.used + 49
    oldest = peek.table(filled.cache).positions[peek.table(filled.cache).cells_of(0)[0]]
    assert oldest == filled.position - steady[1][0]


def test_the_larger_pool_has_ten_times_the_cells_and_the_same_sequences():
    small, large = (PlannedPool(SMALL[1], None, pool) for pool in (1, 10))
    assert peek.table(large.cache).cells == 10 * peek.table(small.cache).cells
    assert occupancy(large)[1] == occupancy(small)[1]


@pytest.mark.parametrize("window", [None, WINDOW])
def test_only_the_planner_with_mask_makes_one_and_one_per_pass(window, monkeypatch):
    filled, made = PlannedPool(SMALL[1], window, 1, mask=True), []
    plain = PlannedPool(SMALL[1], window, 1)
    from_host = type(peek.buffers(filled.cache).backend).from_host

    def remembered(backend, array, *dtype):
        made.append(array)
        return from_host(backend, array, *dtype)

    monkeypatch.setattr(type(peek.buffers(filled.cache).backend), "from_host", remembered)
    plain.contestant().run(2)
    assert not made
    filled.contestant().run(3)
    assert [mask.sum(axis=1).tolist() for mask in made] == [
        [window or position + 1] * 3 for position in range(filled.position - 3, filled.position)
    ]


def test_progress_counts_to_the_end():
    seen = []
    run_plan(SMALL, WINDOW, rounds=2, progress=lambda *what: seen.append(what))
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert {total for _, total, _ in seen} == {6}
    assert [label for _, _, label in seen] == [load.label for load in SMALL for _ in range(3)]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"window": 0}, "window must be >= 1; got 0"),
        ({"rounds": 0}, "rounds must be >= 1; got 0"),
        ({"loads": [Load(0, 8, 8)]}, "sequences must be >= 1; got 0"),
        ({"loads": [Load(1, 8, 0)]}, "used must be >= 1; got 0"),
        ({"loads": [Load(1, 8, 9)]}, "used must be <= capacity; got 9 > 8"),
        ({"loads": [Load(1, 32, 8)], "window": 8}, "a window .* every token drops"),
    ],
)
def test_senseless_requests_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        run_plan(**{"loads": SMALL, "window": WINDOW, **wrong})


def made_of(*timings):
    return PlanReport(
        3,
        "a machine",
        {"numpy": "2.0"},
        tuple(
            PlanTiming(*load, window, pool, mask, 8, (us, us, us))
            for load, window, pool, mask, us in timings
        ),
    )


@pytest.mark.parametrize(
    ("load", "mask", "limit"),
    [
        (LOADS[0], False, 30),
        (LOADS[1], False, 150),
        (LOADS[2], False, 600),
        (LOADS[1], True, 3_000),
        (LOADS[2], True, 60_000),
    ],
)
@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize("passed", [True, False])
def test_bounds(load, mask, limit, window, passed):
    us = limit if passed else limit + 1
    (verdict,) = made_of((load, window, 1, mask, us)).verdicts
    assert (verdict.load, verdict.measured, verdict.passed) == (load.label, us, passed)
    assert verdict.bound == f"<= {limit:,g}us"
    assert verdict.rule == ("with mask" if mask else "without mask")
    assert verdict.at == ("all tokens" if window is None else "window 1,024")


def test_nothing_bounds_a_mask_of_one_sequence_nor_other_loads():
    assert not made_of((LOADS[0], None, 1, True, 1e9)).verdicts
    assert not made_of((Load(2, 8, 4), None, 1, False, 1e9)).verdicts


@pytest.mark.parametrize(("large", "passed"), [(12.0, True), (12.5, False)])
def test_cost_must_not_rise_with_the_pool_and_the_worst_counts(large, passed):
    load = Load(2, 8, 4)
    (verdict,) = made_of(
        (load, None, 1, False, 10.0),
        (load, None, 10, False, 1.0),
        (load, 1024, 1, True, 10.0),
        (load, 1024, 10, True, large),
    ).verdicts
    assert (verdict.rule, verdict.at) == ("10x the cells", "window 1,024, mask")
    assert (verdict.measured, verdict.passed) == (large / 10, passed)


def test_a_report_survives_its_file(planned, tmp_path):
    planned.to_json(tmp_path / "report.json")
    assert PlanReport.from_json(tmp_path / "report.json") == planned


def test_reports_of_other_benchmarks_are_refused(planned, tmp_path):
    planned.to_json(tmp_path / "report.json")
    with pytest.raises(ValueError, match=r"reads reports of the format kvcache\.bench\.append/1"):
        kvcache.bench.AppendReport.from_json(tmp_path / "report.json")


def test_the_table_shows_every_figure_in_80_columns():
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    load = LOADS[2]
    report = made_of(
        *(
            (load, window, pool, mask, 100.0 * (pool + 2 * mask) + bool(window))
            for window in (None, 1024)
            for mask in (True, False)
            for pool in (10, 1)
        )
    )
    console.print(report.to_table())
    text = console.file.getvalue()
    assert "…" not in text  # a column cut off
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert [load.label] == [line.strip() for line in lines if "256" in line][:1]
    assert ["all", "tokens", "100", "1,000", "300", "1,200"] in rows
    assert ["window", "1,024", "101", "1,001", "301", "1,201"] in rows
    assert "without mask <= 600us 101 window 1,024 pass".split() in rows
    assert "10x the cells <= 1.2x 10.0 all tokens MISS".split() in rows
    assert "Targets: 4 of 5 hold" in text
