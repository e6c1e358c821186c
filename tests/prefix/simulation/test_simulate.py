"""Replayed traces: what is counted, the optimum against trying everything, and the command."""

import gzip
import json
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.prefix.policies import POLICIES, Gittins, make_policy
from kvcache.prefix.policies.classes import NEW, class_of
from kvcache.prefix.simulation.ceiling import Informed, hazard_of
from kvcache.prefix.simulation.hints import hints_of
from kvcache.prefix.simulation.replay import found_without_limit, optimum, replay
from kvcache.prefix.simulation.report import in_short, run_simulation
from kvcache.prefix.simulation.trace import Request, read_trace

GOOD = '{"timestamp": 5, "input_length": 9, "output_length": 1, "hash_ids": [7, 8]}'


def requests_for(*prompts):
    """One per second."""
    return [Request(float(now), np.array(blocks, np.int32)) for now, blocks in enumerate(prompts)]


def conversations(seed=0, users=60):
    """Prompts that go on from what they were before, and some that come only once."""
    chance, prompts, new = random.Random(seed), [], iter(range(1, 10**9))
    talks = [[0, *(next(new) for _ in range(4))] for _ in range(users)]
    for _ in range(users * 5):
        at = chance.randrange(users)
        prompts.append(list(talks[at]))
        talks[at] += [next(new) for _ in range(chance.randrange(1, 4))]
        if chance.random() < 0.4:
            prompts.append([0, *(next(new) for _ in range(chance.randrange(1, 20)))])
    return requests_for(*prompts)


def by_trying(requests, budget):
    """The most blocks that can be found, by trying all that may be kept after each request."""

    def closed(blocks):
        return all(parent[block] in {None, *blocks} for block in blocks)

    parent = {}
    for request in requests:
        ids = request.blocks.tolist()
        parent.update(zip(ids, [None, *ids], strict=False))
    best = {frozenset(): 0}
    for request in requests:
        ids = request.blocks.tolist()
        after = {}
        for kept, found in best.items():
            at_hand = kept.union(ids)
            for size in range(min(budget, len(at_hand)) + 1):
                for some in map(frozenset, combinations(at_hand, size)):
                    if closed(some):
                        gain = found + sum(each in kept for each in ids)
                        after[some] = max(after.get(some, 0), gain)
        best = after
    return max(best.values())


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_nobody_finds_more_than_the_optimum_and_somebody_does_find_that(prompts, budget):
    numbers = {}
    requests = requests_for(
        *(
            [numbers.setdefault(tuple(ids[: at + 1]), len(numbers)) for at in range(len(ids))]
            for ids in prompts
        )
    )
    most = optimum(requests, budget)
    assert most == by_trying(requests, budget)
    for name in POLICIES:
        assert replay(requests, make_policy(name), budget)[0] <= most


def test_what_is_found():
    requests = requests_for([0, 1, 2], [0, 1, 3], [0, 1, 2, 4], [9], [0, 1, 3])
    assert (
        replay(requests, make_policy("lru"), None)[0]
        == found_without_limit(requests)
        == 0 + 2 + 3 + 0 + 3
    )
    found, index = replay(requests, make_policy("lru"), 4)
    assert found == 0 + 2 + 3 + 0 + 2
    assert index.nbytes <= 4
    assert optimum(requests, 4) == 8


@pytest.mark.parametrize("name", POLICIES)
def test_more_room_finds_more_up_to_all_there_is(name):
    requests = conversations()
    found = [replay(requests, make_policy(name), budget)[0] for budget in (20, 200, 100_000)]
    assert found == sorted(found)
    assert found[-1] == optimum(requests, 100_000) == found_without_limit(requests)
    assert found[0] < optimum(requests, 20)


def test_a_policy_that_learns_beats_one_that_does_not():
    """Where half of all prompts never come back, and the others after 200 seconds."""
    prompts = []
    for step in range(2_000):
        prompts.append([1_000 + step % 100 * 50 + place for place in range(5)])
        prompts.append([10**6 + step * 10 + place for place in range(10)])
    requests = requests_for(*prompts)
    found = {name: replay(requests, make_policy(name), 700)[0] for name in POLICIES}
    assert found["lru"] == 0
    assert found["gittins"] > 0.8 * optimum(requests, 700)


def announced(answers=True, steps=3_000):
    """Prompts that come back after 200 s where the answer was long, as one in four is."""
    prompts, answered = [], []
    for step in range(steps):
        long = step % 4 == 0
        prompts.append([10 * (step // 800 * 800 + step % 200 if long else step) + 10**5 * long])
        answered.append(400 if long else 20)
    return [
        Request(float(now), np.arange(first, first + 5), answer if answers else None)
        for now, ([first], answer) in enumerate(zip(prompts, answered, strict=True))
    ]


def test_an_answer_tells_who_comes_back():
    requests, ignorant = announced(), announced(answers=False)
    found, blind = (replay(some, make_policy("gittins"), 400)[0] for some in (requests, ignorant))
    assert found > 1.3 * blind
    informed = Informed(hazard_of(requests))
    assert blind < found < replay(requests, informed, 400)[0] <= optimum(requests, 400)


def test_the_ceiling_learns_nothing_and_knows_all_from_the_beginning():
    requests = announced(steps=1_500)
    hazard = hazard_of(requests)
    known = hazard.copy()
    short, long = (class_of(0, 5 * 512, NEW, answered) for answered in (20, 400))
    assert hazard[long].max() > 10 * hazard[short].max()
    replay(requests, Informed(hazard), 400)
    assert np.array_equal(hazard, known)


@pytest.mark.parametrize("block_size", [16, 512])
def test_classes_are_of_tokens_whatever_the_size_of_a_block(block_size):
    policy = Gittins()
    _, index = replay(
        [Request(0.0, np.arange(64), 40), Request(60.0, [99], 0)], policy, None, block_size
    )
    [kind] = {span.policy_data.kind for span in index.kept if span.node.first == 0}
    assert kind == class_of(0, 64 * block_size, NEW, 40)


def test_seeds_are_averaged():
    requests = announced(steps=1_200)
    simulation = run_simulation("t", requests, ["gittins"], [600 * 512], 512, seeds=3)
    found = [replay(requests, Gittins(seed), 600)[0] for seed in range(3)]
    assert len({*found}) > 1
    assert simulation.outcomes[0].found == round(sum(found) / 3)


# Hints.


def test_who_returns():
    requests = requests_for([1, 2, 3], [1, 2, 4, 5], [9], [1], [9], [1, 2, 4, 6])
    assert hints_of(requests, 0.0) == [True, True, True, True, False, False]
    assert hints_of(requests, 1.0) == [False, False, False, False, True, True]


def test_hints_are_wrong_both_ways_as_often_as_said():
    requests = requests_for(*([number % 700] for number in range(1000)))
    right, said = hints_of(requests, 0.0), hints_of(requests, 0.18, seed=3)
    for returns in (True, False):
        wrong = [
            hint != returns for hint, truth in zip(said, right, strict=True) if truth == returns
        ]
        assert len(wrong) >= 300
        assert sum(wrong) / len(wrong) == pytest.approx(0.18, abs=0.06)
    assert said == hints_of(requests, 0.18, seed=3) != hints_of(requests, 0.18, seed=4)


def returning(pause, steps=60):
    """Every tenth prompt returns, `pause` seconds later, with another last block."""
    prompts = [
        Request(float(at), [10 * step, 10 * step + 1, 10 * step + 2 + turn])
        for step in range(steps)
        for turn in range(2 if step % 10 == 0 else 1)
        for at in [step + pause * turn]
    ]
    return sorted(prompts, key=lambda request: request.now)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_said_to_return_is_kept(name):
    requests = returning(pause=15)
    right, wrong = hints_of(requests, 0.0), hints_of(requests, 1.0)
    most = optimum(requests, 12)
    assert most == 2 * 6 == found_without_limit(requests)
    assert replay(requests, make_policy(name), 12, hints=right)[0] == most
    assert replay(requests, make_policy(name), 12, hints=wrong)[0] == 0
    blind = replay(requests, make_policy(name), 12)[0]
    assert blind == replay(requests, make_policy(name), 12, hints=[False] * len(requests))[0] < most


def test_hints_are_of_use_for_ten_minutes():
    for pause, found in ((590, 2), (610, 0)):
        requests = [
            Request(0.0, [1, 2, 3]),
            *(Request(600.5, [10 * number]) for number in range(9, 12) if pause > 600),
            *(Request(1.0, [10 * number]) for number in range(5, 9)),
            Request(float(pause), [1, 2, 4]),
        ]
        requests.sort(key=lambda request: request.now)
        hints = [request.blocks[0] == 1 for request in requests]
        assert replay(requests, make_policy("lru"), 3, hints=hints)[0] == found


def test_each_request_has_its_hint():
    with pytest.raises(ValueError, match="one for each request; got 1 for 2 requests"):
        replay(requests_for([1], [2]), make_policy("lru"), 3, hints=[True])


def test_hinted_in_a_simulation():
    requests = returning(pause=15)
    simulation = run_simulation("t", requests, ["lru"], [12], 1, seeds=2, hints=0.5)
    found = [
        replay(requests, Gittins(seed), 12, 1, hints_of(requests, 0.5, seed))[0]
        for seed in range(2)
    ]
    assert simulation.policies == ["lru", "hinted", "ceiling", "optimum"]
    assert simulation.outcomes[1].found == round(sum(found) / 2)
    assert simulation.hints == 0.5
    with pytest.raises(ValueError, match=r"share of wrong ones, 0 to 1; got 1\.5"):
        run_simulation("t", requests, ["lru"], [12], 1, hints=1.5)
    with pytest.raises(TypeError, match="share of wrong ones, a finite number; got 'many'"):
        run_simulation("t", requests, ["lru"], [12], 1, hints="many")


def write(path, *lines):
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_reading_a_trace(tmp_path, name):
    lines = [
        {"timestamp": 0, "hash_ids": [2**60, 5], "output_length": 7},
        {"timestamp": 1500, "hash_ids": [6, 5]},
    ]
    first, second = read_trace(write(tmp_path / name, *map(json.dumps, lines)))
    assert (first.now, second.now) == (0.0, 1.5)
    assert (first.answered, second.answered) == (7, None)
    assert first.blocks.dtype == np.int32
    assert not {*first.blocks.tolist()} & {*second.blocks.tolist()}, "5 has another history"


@pytest.mark.parametrize(
    "bad",
    [
        *("", "{", "[]", "5", '{"timestamp": 7}', '{"hash_ids": []}', "\udcff"),
        *(
            f'{GOOD[:-1]}, "output_length": {odd}}}'
            for odd in ("-1", "1.5", "null", "true", "9" * 20)
        ),
        *('{"timestamp": "7", "hash_ids": []}', '{"timestamp": 7, "hash_ids": [1.5]}'),
        *('{"timestamp": 7, "hash_ids": 3}', '{"timestamp": 7, "hash_ids": [true]}'),
    ],
)
def test_a_broken_line_is_named(tmp_path, bad):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(f"{GOOD}\n{bad}\n{GOOD}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 2: a request is a JSON object"):
        read_trace(path)


def test_other_broken_traces(tmp_path):
    path = write(tmp_path / "trace.jsonl", GOOD, GOOD, '{"timestamp": 4, "hash_ids": []}')
    with pytest.raises(ValueError, match=r"line 3: .* order of their timestamps; got 4 after 5"):
        read_trace(path)
    whole = gzip.compress(f"{GOOD}\n".encode() * 500)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.gz ends too early"):
        read_trace(tmp_path / "cut.gz")


def test_senseless_simulations_are_refused_before_they_begin():
    def no_tick():
        pytest.fail("it has begun")

    requests = requests_for([1])
    for policies, capacities, block_size, message in (
        (["lru", "lfu"], [1024], 512, "no policy 'lfu'"),
        (["lru"], [1024, 511], 512, "at least a block of 512 tokens; got 511"),
        (["lru"], [1024], 0, "block_size must be >= 1 token; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run_simulation("t", requests, policies, capacities, block_size, no_tick)


def test_units():
    shown = [in_short(tokens) for tokens in (512, 300_000, 2_500_000, 10**7, 2 * 10**9)]
    assert shown == ["512", "300k", "2.5M", "10M", "2G"]


# the command


def invoke(*arguments):
    testing = pytest.importorskip("typer.testing")
    from kvcache.cli import app

    return testing.CliRunner().invoke(app, ["simulate", *map(str, arguments)])


@pytest.fixture
def trace(tmp_path):
    records = (
        {"timestamp": round(1000 * each.now), "hash_ids": each.blocks.tolist()}
        for each in conversations(users=20)
    )
    return write(tmp_path / "trace.jsonl.gz", *map(json.dumps, records))


def test_command(trace, tmp_path):
    path = tmp_path / "found.json"
    options = "--capacity 1k,0.01M --policy gittins,lru --block-size 10 --hints 0 --json".split()
    result = invoke(trace, *options, path)
    assert result.exit_code == 0, result.output
    requests = read_trace(trace)
    blocks = sum(each.blocks.size for each in requests)
    best = f"{100 * optimum(requests, 100) / blocks:.2f}"
    lru = f"{100 * replay(requests, make_policy('lru'), 100)[0] / blocks:.2f}"
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["gittins", "lru", "hinted", "ceiling", "optimum"] in rows
    assert ("1k", lru, best) in [(row[0], row[2], row[5]) for row in rows if len(row) == 6]
    assert "hinted: gittins, told which prompts return, 0 % of it wrong" in " ".join(
        result.stdout.split()
    )
    assert f"{len(requests):,} requests for {blocks:,} blocks of 10 tokens" in result.stdout
    record = json.loads(path.read_text())
    assert (record["format"], record["trace"]) == ("kvcache.simulate/1", "trace.jsonl.gz")
    found = {(each["policy"], each["capacity"]): each for each in record["outcomes"]}
    assert len(found) == 10
    assert record["hints"] == 0
    assert found["optimum", 1000]["found"] == optimum(requests, 100)
    assert f"{found['lru', 1000]['percent']:.2f}" == lru
    assert found["lru", 1000]["evictions"] > 0


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(trace, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        path = tmp_path / f"{name}.{suffix}"
        result = invoke(trace, "--capacity", "20k,100k", "--policy", "lru", "--plot", path)
        assert result.exit_code == 0, result.output
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in content
    if suffix == "svg":
        assert b">optimum</text>" in content, "text stays text"
        assert content == (tmp_path / "one.svg").read_bytes(), "the same figure, the same file"


@pytest.mark.parametrize("name", ["figure.docx", "figure"])
def test_a_plot_in_an_unknown_format(tmp_path, name):
    pytest.importorskip("matplotlib")
    simulation = run_simulation("t", requests_for([1]), ["lru"], [8], 8)
    with pytest.raises(ValueError, match=r"names its format, .*png.*; got '(\.docx)?'"):
        simulation.plot(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_plot_without_matplotlib_is_refused_first(trace, monkeypatch):
    pytest.importorskip("typer")
    monkeypatch.setattr("kvcache.cli.simulate.find_spec", lambda name: None)
    result = invoke(trace, "--plot", "figure.png")
    assert result.exit_code == 2
    assert "matplotlib" in result.output


@pytest.mark.parametrize("bad", ["3Q", "M", "-1", "1e6", "", ",", "9" * 400, "\u0663", "nan"])
def test_capacities(trace, bad):
    result = invoke(trace, f"--capacity={bad}")
    assert result.exit_code == 2
    assert "300k, 3M or 2.5M" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "figure.docx"], "ends in .png or .svg; got figure.docx"),
        (["--plot", "missing/figure.png"], "--plot takes a file in a folder that exists"),
        (["--json", "missing/found.json"], "--json takes a file in a folder that exists"),
        (["--hints", "1.5"], "--hints takes the share of wrong ones, 0 to 1; got 1.5"),
        (["--seeds", "0"], "--seeds takes runs, 1 to 100; got 0"),
        (["--block-size", "0"], "--block-size takes tokens, at least 1; got 0"),
        (["--policy", "lru,lfu"], "there is no policy 'lfu'"),
    ],
)
def test_options_are_refused_before_the_trace_is_read(trace, monkeypatch, options, message):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("kvcache.cli.simulate.read_trace", lambda _: pytest.fail("it was read"))
    result = invoke(trace, *options)
    assert result.exit_code != 0
    assert message in " ".join(f"{result.output} {result.exception}".replace("│", " ").split())


@pytest.mark.parametrize(
    "line",
    [
        GOOD.replace("5", "NaN"),
        GOOD.replace("5", "Infinity"),
        GOOD.replace("5", "9" * 400),
        GOOD.replace("5", "true"),
        GOOD.replace("[7, 8]", '""'),
        GOOD.replace("[7, 8]", "{}"),
    ],
)
def test_odd_numbers_in_a_trace_are_named(tmp_path, line):
    path = write(tmp_path / "trace.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=r"line 2: a request is a JSON object with a finite"):
        read_trace(path)


def test_help_teaches_by_an_example():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "kvcache simulate trace.jsonl.gz" in result.stdout
