"""Every contestant takes part or says why not; what is measured is never judged by time here."""

import subprocess
import sys
import weakref
from importlib.util import find_spec

import numpy as np
import pytest

import kvcache
from kvcache.bench import installed_backends, run_append
from kvcache.bench.append.case import MEMMOVE, OURS, RAW_VIEWS, AppendCase
from kvcache.bench.append.contestants import factories
from kvcache.bench.frameworks import framework_of
from kvcache.bench.harness.contest import RAW, UnavailableError

EVERYONE = {MEMMOVE, RAW, RAW_VIEWS, *OURS}
PEERS = {
    "torch": ("transformers", {"transformers StaticCache", "transformers DynamicCache"}),
    "mlx": ("mlx_lm", {"mlx-lm KVCache", "mlx-lm RotatingKVCache"}),
}


def dtypes_of(backend):
    return [dtype for dtype in ("float32", "bfloat16") if dtype in backend.dtypes]


def contestants(backend, dtype="float32", capacity=16):
    case = AppendCase(backend, dtype, capacity, batch=1, heads=2, head_dim=4)
    framework, able = framework_of(backend), []
    with framework.scope():
        for make in factories(framework).values():
            try:
                able.append(make(case))
            except UnavailableError:
                continue
    return able


def test_everyone_takes_part_at_every_capacity_or_says_why(backend, report):
    expected = EVERYONE | PEERS.get(backend.name, ("", set()))[1]
    assert [(backend.spec, dtype) for dtype in dtypes_of(backend)] == report.groups
    for _, dtype in report.groups:
        took_part = report.contestants(backend.spec, dtype)
        excused = {
            skip.contestant for skip in report.skipped if skip.dtype == dtype and skip.reason
        }
        assert expected <= took_part.keys() | excused
        assert not took_part.keys() & excused
        for timings in took_part.values():
            assert [timing.capacity for timing in timings] == [8, 32]


def test_ours_and_raw_are_never_excused(report):
    for group in report.groups:
        assert {RAW, *OURS} <= report.contestants(*group).keys()


@pytest.mark.installation
def test_peers_take_part_where_they_are_installed(backend, report):
    module, peers = PEERS.get(backend.name, ("", set()))
    if not peers:
        pytest.skip("no other library has a cache for these arrays")
    if find_spec(module) is None:
        reasons = {skip.contestant: skip.reason for skip in report.skipped}
        assert all("pip install" in reasons[peer] for peer in peers)
    else:
        assert peers <= report.contestants(backend.spec, "float32").keys()


def test_every_round_is_recorded(report):
    for timing in report.timings:
        # Whoever is very slow has a turn in the first of the two rounds only.
        assert len(timing.rounds_us) in {1, 2}
        assert all(us > 0 for us in timing.rounds_us)
        assert 1 <= timing.steps <= timing.capacity // 4


def test_a_dtype_the_framework_lacks_is_skipped_with_the_reason():
    pytest.importorskip("array_api_strict")
    spec = "array_api:array_api_strict"
    ticks = []
    report = run_append(
        [spec], ["bfloat16"], [8], rounds=3, progress=lambda done, *_: ticks.append(done)
    )
    assert ticks == [1, 2, 3, 4]
    assert not report.timings
    (skip,) = report.skipped
    assert (skip.backend, skip.dtype, skip.contestant) == (spec, "bfloat16", "")
    assert "bfloat16" in skip.reason


def test_progress_counts_to_the_end():
    seen = []
    run_append(
        ["numpy"],
        capacities=[8],
        heads=1,
        head_dim=4,
        rounds=2,
        progress=lambda done, total, label: seen.append((done, total, label)),
    )
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert {total for _, total, _ in seen} == {6}
    assert [label for _, _, label in seen] == ["numpy:cpu float32"] * 3 + ["numpy:cpu bfloat16"] * 3


def test_a_backend_named_twice_is_measured_once(numpy_report):
    twice = run_append(["numpy", "numpy:cpu"], ["float32", "float32"], [8, 8], heads=1, rounds=1)
    assert twice.groups == [("numpy:cpu", "float32")]
    assert len(twice.timings) == len(numpy_report.contestants("numpy:cpu", "float32"))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"heads": 0}, "heads must be >= 1; got 0"),
        ({"rounds": 0}, "rounds must be >= 1; got 0"),
        ({"capacities": [1024, 3]}, "capacities must be >= 4 tokens; got"),
        ({"capacities": []}, "capacities must be >= 4 tokens; got"),
    ],
)
def test_senseless_requests_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        run_append(**{"backends": ["numpy"], **wrong})


def test_an_unknown_dtype_is_refused():
    with pytest.raises(kvcache.DTypeError, match=r"a dtype is one of float32, .*; got 'float33'"):
        run_append(["numpy"], ["float32", "float33"])


def test_an_unknown_backend_is_refused_before_anything_is_measured():
    ticks = []
    with pytest.raises(kvcache.UnknownBackendError):
        run_append(["numpy", "nonsense"], progress=lambda done, *_: ticks.append(done))
    assert not ticks


def test_installed_backends_can_all_be_made():
    names = installed_backends()
    assert "numpy" in names
    assert [kvcache.get_backend(name).name for name in names] == names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_everyone_can_be_repeated_without_end(backend, dtype):
    """Rewinding undoes a block exactly, so that no cache grows or runs full while it is timed."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    with framework_of(backend).scope():
        for contestant in contestants(backend, dtype):
            for steps in (1, 6, 6, 6, 3, 6):
                contestant.rewind(steps)
                contestant.run(steps)


def test_our_caches_are_as_full_as_they_claim_and_never_grow(monkeypatch):
    made = []
    start = kvcache.KVCache._start

    def remember(cache):
        made.append(weakref.ref(cache))
        start(cache)

    monkeypatch.setattr(kvcache.KVCache, "_start", remember)
    entries = contestants(kvcache.get_backend("numpy"), capacity=16)
    caches = [ref() for ref in made]
    assert [type(cache) for cache in caches] == [kvcache.KVCache, kvcache.RotatingKVCache]
    for entry in entries:
        for _ in range(4):
            entry.rewind(5)
            entry.run(5)
    assert [(cache.len, cache.growths) for cache in caches] == [(16, 0), (16, 0)]


def test_peers_hold_as_much_history_as_ours(monkeypatch):
    transformers = pytest.importorskip("transformers")
    made = {}

    class Dynamic(transformers.DynamicCache):
        def __init__(self):
            super().__init__()
            made["dynamic"] = self

    class Static(transformers.StaticCache):
        def __init__(self, **options):
            super().__init__(**options)
            made["static"] = self

    monkeypatch.setattr(transformers, "DynamicCache", Dynamic)
    monkeypatch.setattr(transformers, "StaticCache", Static)
    backend = kvcache.get_backend("torch", device="cpu")
    with framework_of(backend).scope():
        for entry in contestants(backend, capacity=16):
            for _ in range(5):
                entry.rewind(4)
                entry.run(4)
    assert made["dynamic"].get_seq_length() == 16 + 4
    assert made["static"].get_seq_length() == 16


def test_mlx_peers_hold_as_much_history_as_ours(monkeypatch):
    peers = pytest.importorskip("mlx_lm.models.cache")
    made = []

    class Remembered(peers.KVCache):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(peers, "KVCache", Remembered)
    for entry in contestants(kvcache.get_backend("mlx"), capacity=256):
        for _ in range(5):
            entry.rewind(4)
            entry.run(4)
    (cache,) = made
    assert (cache.offset, cache.keys.shape[2]) == (256, 256)


def test_memmove_moves_the_bytes_of_one_token_per_step(monkeypatch):
    made = []

    class Remembered(bytearray):
        def __init__(self, size):
            super().__init__(b"\xff" * size)
            made.append(self)

    monkeypatch.setattr(kvcache.bench.frameworks.base, "bytearray", Remembered, raising=False)
    (memmove,) = (c for c in contestants(kvcache.get_backend("numpy")) if c.name == MEMMOVE)
    memmove.run(3)
    token = 1 * 2 * 4 * 4
    assert [len(buffer) for buffer in made] == [16 * token] * 2
    assert [buffer.count(0) for buffer in made] == [3 * token] * 2
    assert [buffer[-3 * token :].count(0) for buffer in made] == [3 * token] * 2


@pytest.mark.parametrize("name", [RAW, RAW_VIEWS, "slice_update"])
def test_writers_write_the_last_slots(monkeypatch, name):
    backend, made = kvcache.get_backend("numpy"), []

    def remembered(self, shape, dtype):
        made.append(np.zeros(shape, dtype))
        return made[-1]

    monkeypatch.setattr(type(backend), "alloc", remembered)
    case = AppendCase(backend, "float32", 16, batch=1, heads=2, head_dim=4)
    factories(framework_of(backend))[name](case).run(3)
    assert len(made) == 2
    for buffer in made:
        assert (buffer[:, :, -3:] == 1).all()
        assert (buffer[:, :, :-3] == 0).all()


@pytest.mark.installation
def test_importing_it_imports_no_framework_and_no_printer():
    program = "import sys, kvcache.bench; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    unwanted = {"torch", "jax", "mlx", "transformers", "mlx_lm", "rich", "matplotlib"}
    assert not unwanted & set(result.stdout.split())
