"""Lookups and evictions are measured in a steady state, and judged by bounds that are known."""

import io
from importlib.util import find_spec
from itertools import islice

import numpy as np
import pytest

from kvcache.bench import PrefixReport, PrefixTiming, run_prefix
from kvcache.bench.prefix import report as promised
from kvcache.bench.prefix.run import (
    Readers,
    Writers,
    empty_tree,
    full_index,
    make_sequences,
    query_of,
)
from kvcache.prefix.policies import POLICIES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured():
    return run_prefix(prompts=2, users=3, spans=50, rounds=2)


def test_everything_is_measured(measured):
    names = [timing.name for timing in measured.timings]
    lookups = [promised.MATCH, promised.FOLLOW, promised.INSERT, promised.EXTEND]
    sessions = [promised.SESSION, promised.TOLD]
    if find_spec("zmq") and find_spec("msgspec"):
        sessions.append(promised.PUBLISHED)
    assert names == [*lookups, promised.SHORT, promised.LONG, *sessions, *POLICIES]
    assert all(min(timing.rounds_us) > 0 for timing in measured.timings)
    assert {
        len(timing.rounds_us) for timing in measured.timings if timing.name not in sessions
    } == {2}
    assert [timing.steps for timing in measured.evictions] == [25] * len(POLICIES)
    assert all(timing.longest_us >= timing.us for timing in measured.evictions)
    assert (measured.sequences, measured.spans, measured.rounds) == (6, 50, 2)


def test_users_of_a_prompt_begin_alike():
    sequences = make_sequences(3, 4)
    assert {(tokens.size, tokens.dtype.name) for tokens in sequences} == {(2048, "int32")}
    heads = [bytes(tokens[:1024]) for tokens in sequences]
    assert sorted(heads.count(head) for head in set(heads)) == [4, 4, 4]
    assert len({bytes(tokens) for tokens in sequences}) == 12


def test_readers_find_all_and_queries_leave_early():
    sequences = make_sequences(2, 2)
    readers = Readers(sequences, sequences)
    assert [readers.tree.match(tokens).length for tokens in sequences] == [2048] * 4
    asked = list(islice(readers._queries, 5))
    assert asked[0] is asked[4]
    readers.follow_and_use(8)
    assert [
        [span.uses for span in readers.index.follow(readers.spans, tokens).spans]
        for tokens in sequences
    ] == [[6, 3]] * 4  # one use by each user when it came, and two of eight queries
    [query] = query_of(sequences[0], 4_000)
    assert (query.size, readers.tree.match(query).length) == (4_000, 100)


def test_writers_begin_anew_when_too_few_are_left():
    came = []
    begun = []

    def empty():
        begun.append(len(came))
        return lambda tokens: came.append(int(tokens[0]))

    writer = Writers("some", [np.array([at], np.int32) for at in range(5)], empty).contestant()
    for steps in (3, 2, 2):
        writer.rewind(steps)
        writer.run(steps)
    assert came == [0, 1, 2, 3, 4, 0, 1]
    assert begun == [0, 5]
    insert = empty_tree()
    assert insert(np.array([1], np.int32)) is insert(np.array([1], np.int32))


@pytest.mark.parametrize("name", POLICIES)
def test_all_spans_of_a_full_index_may_go(name):
    index = full_index(name, 20)
    index.budget = 0
    index.trim(1.0)
    assert (index.evictions, index.nbytes) == (20, 0)


def test_progress_counts_to_the_end():
    seen = []
    run_prefix(1, 3, 4, rounds=2, progress=lambda *what: seen.append(what))
    assert [done for done, _, _ in seen] == list(range(1, 7 + 2 * len(POLICIES)))
    assert {total for _, total, _ in seen} == {len(seen)}
    assert seen[-1][2] == "evictions, gittins"


@pytest.mark.parametrize("wrong", ["prompts", "users", "spans", "rounds"])
def test_senseless_requests_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{wrong} must be >= 1; got 0"):
        run_prefix(**{wrong: 0})


def made_of(*timings):
    return PrefixReport(
        2000,
        100_000,
        3,
        "a machine",
        {"numpy": "2.0"},
        tuple(PrefixTiming(name, tokens, 8, (us,) * 3, most) for name, tokens, us, most in timings),
    )


@pytest.mark.parametrize(("name", "rate"), [(promised.MATCH, 400), (promised.INSERT, 110)])
@pytest.mark.parametrize("passed", [True, False])
def test_bounds_of_lookups(name, rate, passed):
    us = 2048 / (rate if passed else rate - 1)
    (verdict,) = made_of((name, 2048, us, None), (promised.FOLLOW, 2048, 1e9, None)).verdicts
    assert (verdict.rule, verdict.bound, verdict.passed) == (name, f">= {rate}M/s", passed)
    assert verdict.measured == pytest.approx(rate if passed else rate - 1)


@pytest.mark.parametrize(("us", "passed"), [(3.0, True), (3.1, False)])
def test_a_longer_query_may_not_cost_more(us, passed):
    (verdict,) = made_of(
        (promised.SHORT, 4_000, 2.0, None), (promised.LONG, 40_000, us, None)
    ).verdicts
    assert (verdict.at, verdict.measured, verdict.passed) == ("40,000 tokens", us / 2, passed)


@pytest.mark.parametrize("name", [promised.TOLD, promised.PUBLISHED])
@pytest.mark.parametrize(("us", "passed"), [(105.0, True), (106.0, False)])
def test_events_may_cost_a_twentieth_of_a_session(name, us, passed):
    (verdict,) = made_of((promised.SESSION, 2048, 100.0, None), (name, 2048, us, None)).verdicts
    assert (verdict.rule, verdict.bound, verdict.passed) == (name, "<= 1.05x", passed)
    assert verdict.measured == us / 100


@pytest.mark.parametrize(("longest", "passed"), [(5_000.0, True), (5_001.0, False)])
def test_no_eviction_may_take_long(longest, passed):
    (verdict,) = made_of(("lru", 0, 1.0, longest)).verdicts
    assert (verdict.rule, verdict.measured, verdict.passed) == ("lru", longest, passed)


def test_a_report_survives_its_file(measured, tmp_path):
    measured.to_json(tmp_path / "report.json")
    assert PrefixReport.from_json(tmp_path / "report.json") == measured


def test_the_table_shows_every_figure_in_80_columns():
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    report = made_of((promised.MATCH, 2048, 4.0, None), ("gittins", 0, 41.0, 6_000.0))
    console.print(report.to_table())
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert ["RadixTree.match", "2,048", "4.00", "512"] in rows
    assert ["gittins", "41.0", "6,000"] in rows
    assert "gittins <= 5,000us 6,000 100,000 spans MISS".split() in rows
    assert any(line.startswith("Targets: 1 of 2 hold") for line in lines)


def test_command(tmp_path):
    testing = pytest.importorskip("typer.testing")
    from kvcache.cli import app

    path = tmp_path / "prefix.json"
    options = "bench prefix --users 1 --spans 20 --rounds 1 --json".split()
    result = testing.CliRunner().invoke(app, [*options, str(path)])
    assert result.exit_code == 0, result.output
    assert "us to evict one of 20 spans" in " ".join(result.stdout.split())
    assert PrefixReport.from_json(path).sequences == 20
    result = testing.CliRunner().invoke(app, ["bench", "prefix", "--help"])
    assert "kvcache bench prefix --" in result.stdout
