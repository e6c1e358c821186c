"""A call that raises has changed nothing: every hook that a call uses fails once."""

import signal
from _thread import interrupt_main
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvcache import KVCache, LayerCaches, RotatingKVCache, functional

from .. import peek
from ..failing import Failing
from .oracle import SHAPE, fingerprint


class World:
    """Caches of two kinds with a history, and what was taken from them."""

    def __init__(self, failing, tokens=0):
        self.backend = failing.backend
        self.caches = LayerCaches(
            [KVCache(self.backend, step=8), RotatingKVCache(6, 1, self.backend, step=8)]
        )
        self.snapshots, self.state = [], None
        if tokens:
            self.push(tokens)

    def push(self, tokens, layers=(0, 1)):
        for layer in layers:
            cache = self.caches[layer]
            stamp = cache.offset + 1000 * layer
            arrays = SHAPE.keys(tokens, stamp), SHAPE.values(tokens, stamp)
            cache.update(*map(self.backend.from_host, arrays))

    def update(self, layer, tokens):
        self.push(tokens, [layer])

    def take(self, start=0, stop=None):
        self.snapshots.append(self.caches.snapshot(start, stop))

    def seen(self):
        """Everything that can be seen, here or by what comes later."""
        for cache in self.caches:
            yield on_any_instance(cache)
            yield len(peek.layer_pins(cache)), peek.checkpoint(cache) is None
            yield sorted(peek.layer_points(cache).scheduled)
            retained = peek.layer_retained(cache)
            yield None if retained is None else seen_rows(retained)
        for snapshot in self.snapshots:
            yield snapshot.start, snapshot.stop, snapshot.resident, snapshot.host_nbytes
            yield [seen_rows(part.rows) for part in snapshot.parts]


def on_any_instance(cache):
    """The fingerprint, the same for caches on two instances of one backend."""
    return [getattr(part, "spec", part) for part in fingerprint(cache)]


def seen_rows(rows):
    content = [array.data.tobytes() for array in rows.content().get(0, ())]
    return rows.positions.tolist(), rows.owner is None, content


def unchanged_by_failures(backend, build, act, go_on=lambda world: world.push(1)):
    """Let `act` fail at each of its calls of a hook, and compare with a world it never ran in."""
    at = 0
    while True:
        at += 1
        failing, clean = Failing(backend), Failing(backend)
        world, untouched = build(failing), build(clean)
        try:
            with failing.failing(at):
                act(world)
        except MemoryError:
            pass
        else:
            assert at > 1, "nothing can fail here"
            return
        assert list(world.seen()) == list(untouched.seen()), f"call {at} left a trace"
        for later in (act, go_on, go_on):
            later(world)
            later(untouched)
        assert list(world.seen()) == list(untouched.seen()), f"call {at} shows later"


def pinned(failing):
    world = World(failing, 6)
    world.take()
    return world


def in_a_draft(failing):
    world = World(failing, 8)
    world.caches.schedule([10, 12])
    world.take()
    world.caches.checkpoint()
    world.push(3)
    world.push(1)
    return world


def scheduled(failing):
    world = World(failing, 6)
    world.caches.schedule([6, 8, 9])
    world.take(2)
    return world


def with_snapshot(failing):
    """Empty caches, and a snapshot of others."""
    other, world = World(failing, 7), World(failing)
    other.take()
    world.snapshots = [other.snapshots[0].to_host()]
    return world


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("held", [0, 5, 8])
def test_update(backend, layer, tokens, held):
    """First use, growth, and a ring that turns; in one step or in several."""
    unchanged_by_failures(
        backend, lambda failing: World(failing, held), lambda world: world.update(layer, tokens)
    )


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("build", [pinned, in_a_draft, scheduled])
def test_update_with_more_at_stake(backend, build, tokens):
    """Pinned rows to spill, a draft to record, resume points to retain."""
    unchanged_by_failures(backend, build, lambda world: world.update(1, tokens))


@pytest.mark.parametrize("accepted", [0, 2, 4])
def test_rollback_asks_the_framework_for_nothing(backend, accepted):
    """What a draft may have to give back is held until then, so nothing can fail."""
    failing = Failing(backend)
    world = in_a_draft(failing)
    with failing.failing(1):
        world.caches.rollback(accepted)
    assert world.caches.offset == 8 + accepted


def test_trim(backend):
    unchanged_by_failures(backend, pinned, lambda world: world.caches.trim(2))


def test_reset(backend):
    unchanged_by_failures(backend, in_a_draft, lambda world: world.caches.reset())


def test_restore(backend):
    unchanged_by_failures(
        backend, with_snapshot, lambda world: world.caches.restore(*world.snapshots)
    )


def test_a_failed_first_use_binds_nothing(backend):
    failing = Failing(backend)
    cache = KVCache(failing.backend, step=8)
    arrays = [failing.backend.from_host(np.ones((1, 2, 3, 4), "f4")) for _ in range(2)]
    with failing.failing(1), pytest.raises(MemoryError):
        cache.update(*arrays)
    assert (cache.dtype, cache.nbytes, cache.offset) == (None, 0, 0)
    other = [failing.backend.from_host(np.ones((2, 1, 1, 2), "f4")) for _ in range(2)]
    keys, _ = cache.update(*other)
    assert keys.shape[0] == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [KVCache, lambda **options: RotatingKVCache(6, 1, **options)])
def test_a_failed_exchange_with_a_program_can_be_repeated(backend, kind, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    shape = SHAPE._replace(dtype=dtype)

    def run(fail_at):
        failing = Failing(backend)
        cache = kind(backend=failing.backend, step=8)
        make = failing.backend.from_host
        cache.update(make(shape.keys(5, 0)), make(shape.values(5, 0)))
        token = make(shape.keys(1, 7)), make(shape.values(1, 7))
        failed = 0
        for call in ("export", "import"):
            for at in (fail_at, None):
                try:
                    with failing.failing(at):
                        if call == "export":
                            state = cache.export_state(9)
                            exported = functional.append(state, *token)[0]
                        else:
                            cache.import_state(exported)
                    break
                except MemoryError:
                    failed += 1
        cache.update(*token)
        return failed, on_any_instance(cache)

    _, expected = run(None)
    at, failed = 1, True
    while failed:
        failed, seen = run(at)
        assert seen == expected, f"call {at}"
        at += 1


def test_layers_that_share_a_cache_fill_it_once(backend):
    failing = Failing(backend)
    source = KVCache(failing.backend)
    source.update(*map(failing.backend.from_host, (SHAPE.keys(5, 0), SHAPE.values(5, 0))))
    shared = KVCache(failing.backend)
    snapshot = LayerCaches([source, source]).snapshot()
    with failing.failing(None):
        LayerCaches([shared, shared]).restore(snapshot)
        both = failing.calls
    with failing.failing(None):
        LayerCaches([KVCache(failing.backend)]).restore(source.snapshot())
        assert failing.calls == both
    assert fingerprint(shared) == fingerprint(source)


def test_a_snapshot_that_fails_pins_nothing():
    world = World(Failing(KVCache("numpy").backend), 8)
    growing, ring = world.caches

    def capture(start, stop):
        raise MemoryError

    ring.capture = capture
    with pytest.raises(MemoryError):
        world.caches.snapshot()
    assert not peek.layer_pins(growing)


@pytest.mark.one_backend(name="jax")
def test_ctrl_c_loses_no_result_of_a_program_that_consumes():
    """A signal that arrives during the call is handled after its result is assigned."""
    pytest.importorskip("jax")
    result, program = "lost", peek.keeping_result(interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        result = interrupt_main(signal.SIGINT)
    assert result == "lost", "else the test proves nothing"
    try:
        result = program(signal.SIGINT)
        len([])  # a call, after which handlers run
    except KeyboardInterrupt:
        pass
    assert result is None


@pytest.mark.one_backend(name="mlx")
class TestMlx:
    """Once what was returned is evaluated, caches hold no graph: any thread may go on."""

    def ring(self):
        pytest.importorskip("mlx.core")
        cache = RotatingKVCache(6, 1, "mlx", step=8)
        self.update(cache, 8)
        return cache

    @staticmethod
    def update(cache, tokens):
        import mlx.core as mx

        # Computed lazily, as by a model: only this thread can compute it.
        ones = mx.ones((1, 2, tokens, 4)) * 2
        mx.eval(*cache.update(ones, ones + 1))

    @staticmethod
    def read_elsewhere(cache):
        def read():
            return [np.array(array) for array in cache.state]

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(read).result()

    def test_after_a_chunk(self):
        cache = self.ring()
        self.update(cache, 3)
        assert (self.read_elsewhere(cache)[0] == 2).all()

    def test_after_a_rollback(self):
        cache = self.ring()
        cache.checkpoint()
        self.update(cache, 3)
        cache.rollback(1)
        assert (self.read_elsewhere(cache)[1] == 3).all()

    def test_after_a_restore(self):
        cache, other = self.ring(), RotatingKVCache(6, 1, "mlx", step=8)
        other.restore(cache.snapshot(), backend="mlx")
        assert (self.read_elsewhere(other)[0] == 2).all()

    def test_memory_does_not_grow(self):
        import mlx.core as mx

        cache = self.ring()

        def active(rounds):
            for _ in range(rounds):
                cache.checkpoint()
                self.update(cache, 3)
                cache.rollback(1)
                self.update(cache, 1)
            return mx.get_active_memory()

        assert active(30) <= active(3) + 4096
