"""What is particular to torch: autograd, inference mode, and tensors that alias a buffer."""

import contextlib
import gc
import weakref

import pytest

import kvcache
from kvcache import KVCache, RotatingKVCache, functional

from .oracle import Oracle, Shape, check_whole, fingerprint, oracle_for, push

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.one_backend(name="torch")

KINDS = {
    "kv": lambda: KVCache("torch", step=2),
    "ring": lambda: RotatingKVCache(5, 1, "torch", step=2),
}
MODES = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def cache(request):
    return request.param()


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request):
    return request.param


other_mode = mode


def everything(cache, oracle):
    """Every kind of update, of rollback and of copy."""
    for tokens in (1, 3, 1, 7, 1):
        push(cache, oracle, tokens, stamp=oracle.offset)
    cache.checkpoint()
    push(cache, oracle, 6, stamp=100)
    mark = oracle.offset - 6
    cache.rollback(2)
    oracle.cut(mark + 2)
    check_whole(cache, oracle)
    cache.copy().update(*(torch.ones(1, 2, 1, dim) for dim in (4, 3)))


def test_in_every_mode(cache, mode):
    with mode():
        everything(cache, oracle_for(cache))


@pytest.mark.parametrize("later", MODES.values(), ids=MODES)
def test_made_in_one_mode_and_used_in_another(cache, mode, later):
    oracle = oracle_for(cache)
    with mode():
        everything(cache, oracle)
        cache.checkpoint()
        push(cache, oracle, 4, stamp=200)
    with later():
        cache.rollback(1)
        oracle.cut(oracle.offset - 3)
        check_whole(cache, oracle)
        everything(cache, oracle)


def test_inference_tensors_may_be_stored(cache):
    with torch.inference_mode():
        update = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 3)
    assert update[0].is_inference()
    for _ in range(4):
        keys, values = cache.update(*update)
    assert bool((keys[:, :, :3] == 1).all())
    assert bool((values[:, :, :3] == 1).all())


def needs_grad(tokens):
    """Keys and values as a model in training makes them: results of a graph."""
    weight = torch.ones(4, requires_grad=True)
    return torch.ones(1, 2, tokens, 4) * weight, torch.ones(1, 2, tokens, 4) * weight


def test_nothing_that_is_held_has_a_graph(cache):
    for tokens in (2, 3, 1, 4, 9, 1):
        cache.update(*needs_grad(tokens))
        for part in (*cache.state, *cache.copy().state):
            assert not part.requires_grad
            assert part.grad_fn is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_views_are_returned(cache, mode):
    with mode():
        weight = torch.nn.Parameter(torch.ones(1, 2, 1, 4))
        for _ in range(2):
            keys, _ = cache.update(weight, weight)
        assert not keys.requires_grad
        assert keys.data_ptr() == cache.state[0].data_ptr()


@pytest.mark.parametrize("updates", [(3,), (2, 1), (4, 1), (6, 1), (3, 4), (6, 2)])
def test_gradients_of_the_latest_update(cache, updates):
    """Attention of its queries, by hand: earlier keys and values are constants."""
    draw = torch.Generator().manual_seed(0)
    made = [[torch.randn(1, 2, tokens, 4, generator=draw) for _ in range(2)] for tokens in updates]
    *earlier, latest = made
    for update in earlier:
        cache.update(*update)
    leaves = [part.clone().requires_grad_() for part in latest]
    columns = cache.update(*leaves)
    allowed, positions = cache.mask(updates[-1]), cache.positions
    expected = [part.clone().requires_grad_() for part in latest]
    whole = [torch.cat(parts, 2) for parts in zip(*earlier, expected, strict=True)]
    plain = [part[:, :, positions.tolist()] for part in whole]
    for keys, values in (columns, plain):
        scores = leaves[0].detach() @ keys.mT
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        (scores.softmax(-1) @ values).square().sum().backward()
    for got, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


def test_gradients_come_and_go(cache):
    """From one update to the next, of the same shape."""
    plain = torch.ones(1, 2, 1, 4)
    for requires_grad in (False, True, True, False, True):
        update = plain.clone().requires_grad_(requires_grad)
        for mode in (torch.no_grad(), torch.enable_grad()):
            with mode:
                keys, _ = cache.update(update, update)
                assert keys.requires_grad == (requires_grad and torch.is_grad_enabled())


def test_function_transforms_are_refused(cache):
    one = torch.ones(1, 2, 1, 4)
    cache.update(one[:, :, :1].repeat(1, 1, 2, 1), one[:, :, :1].repeat(1, 1, 2, 1))
    with pytest.raises(kvcache.TracedArrayError, match=r"kvcache\.functional"):
        torch.func.grad(lambda k: cache.update(k, k)[0].sum())(one)
    with pytest.raises(kvcache.TracedArrayError, match=r"kvcache\.functional"):
        torch.vmap(lambda k: cache.update(k, k)[0])(one[None])
    assert cache.offset == 2


def test_gradients_in_a_pure_function():
    """Of all tokens appended in it."""
    one = torch.ones(1, 2, 1, 4)

    def total(k):
        cache = KVCache("torch")
        cache.update(one, one)
        state = cache.export_state(2)
        for scale in (1, 3):
            state, keys, _ = functional.append(state, k * scale, k)
        return keys.sum()

    leaf = one.clone().requires_grad_()
    total(leaf).backward()
    assert bool((leaf.grad == 4).all())
    assert bool((torch.func.grad(total)(one) == 4).all())


def test_a_state_with_gradients_is_imported_without():
    cache, one = KVCache("torch"), torch.ones(1, 2, 1, 4)
    cache.update(one, one)
    leaf = one.clone().requires_grad_()
    state, _, _ = functional.append(cache.export_state(1), leaf, one)
    cache.import_state(state)
    assert not any(part.requires_grad for part in cache.state)
    cache.update(one, one)


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_graph_of_an_update_can_be_freed(cache, tokens):
    """Also while a checkpoint is open, which keeps copies of what comes."""
    cache.update(*needs_grad(4))
    cache.checkpoint()
    keys, values = needs_grad(tokens)
    node = weakref.ref(keys.grad_fn.next_functions[-1][0].variable)
    cache.update(keys, values)
    del keys, values
    gc.collect()
    assert node() is None, "the cache keeps the graph, and with it the weights, alive"


def test_parameters_and_subclasses_are_tensors(cache):
    class Mine(torch.Tensor):
        pass

    plain = torch.ones(1, 2, 1, 4)
    for update in (torch.nn.Parameter(plain), plain.as_subclass(Mine), plain):
        keys, _ = cache.update(update, update)
        assert type(keys) is torch.Tensor
    assert cache.offset == 3
    assert kvcache.backend_of(plain.as_subclass(Mine)).name == "torch"


def test_views_survive_what_comes_after():
    """Their contents are no longer defined; looking at them must not crash the process."""
    for end in (KVCache.reset, lambda cache: cache.update(*[torch.ones(1, 2, 50, 4)] * 2)):
        cache = KVCache("torch", step=8)
        earlier = [cache.update(*[torch.ones(1, 2, 3, 4)] * 2) for _ in range(2)]
        end(cache)
        gc.collect()
        [torch.full((1, 2, 8, 4), 9.0) for _ in range(8)]  # would land in memory given back
        for keys, values in earlier:
            assert tuple(keys.shape) == tuple(values.shape)
            assert bool((keys == 1).all())
            assert bool((values == 1).all())


def test_reset_gives_the_memory_back():
    cache = KVCache("torch", step=8)
    cache.update(*[torch.ones(1, 2, 8, 4)] * 2)
    (keys, values), before = cache.state, cache.nbytes
    assert before == sum(part.untyped_storage().nbytes() for part in (keys, values))
    references = [weakref.ref(part) for part in (keys, values)]
    cache.reset()
    del keys, values
    assert [reference() for reference in references] == [None, None]


def test_threads_of_one_mode_each():
    """Modes belong to threads; a cache does not."""
    import threading

    cache, oracle, failures = RotatingKVCache(5, 1, "torch"), Oracle(5, 1), []

    def work(mode):
        try:
            with mode():
                everything(cache, oracle)
        except BaseException as error:  # noqa: BLE001 - a thread's error must reach the test
            failures.append(error)

    for mode in (*MODES.values(), *MODES.values()):
        thread = threading.Thread(target=work, args=(mode,))
        thread.start()
        thread.join()
    assert not failures


@pytest.mark.parametrize("device", ["cpu:0", "cpu"])
def test_every_way_to_write_cpu(device):
    cache = KVCache()
    update = torch.ones(1, 2, 1, 4, device=device), torch.ones(1, 2, 1, 4, device="cpu")
    cache.update(*update)
    KVCache(kvcache.get_backend(f"torch:{device}")).update(*update)
    assert cache.backend is not None
    assert cache.backend.device == "cpu"


def test_tensors_of_another_device(cache):
    """The meta device is one that every machine has."""
    oracle, shape = oracle_for(cache), Shape()
    here = [torch.ones(1, 2, 1, dim) for dim in (4, 3)]
    there = [torch.ones(1, 2, 1, dim, device="meta") for dim in (4, 3)]
    for _ in range(9):
        push(cache, oracle, 1, shape)
    for update in (there, (here[0], there[1]), (there[0], here[1])):
        with pytest.raises(kvcache.DTypeError, match=r"torch:cpu, where this cache lives; .*meta"):
            cache.update(*update)
        check_whole(cache, oracle)
    push(cache, oracle, 2, shape)


def test_an_update_without_room_for_its_gradients_changes_nothing(cache, monkeypatch):
    def fail(*_):
        raise MemoryError

    for tokens in (2, 3, 1, 4, 9, 1):
        update = needs_grad(tokens)
        before = fingerprint(cache)
        monkeypatch.setattr(type(kvcache.get_backend("torch")), "with_gradients", fail)
        with pytest.raises(MemoryError):
            cache.update(*update)
        assert fingerprint(cache) == before
        monkeypatch.undo()
        cache.update(*update)


def test_pools_refuse_gradients():
    pool, one = kvcache.CausalCache(), torch.ones(2, 1, 4)
    pool.init("torch", "float32", max_sequences=1, capacity=8, max_batch=4)
    pool.start_forward(kvcache.Batch([0], [0]))
    pool.set_layer(0)
    leaf = torch.nn.Parameter(one)
    for update in ((leaf, one), (one, leaf)):
        with pytest.raises(kvcache.NotSupportedError, match="gradients do not flow through a pool"):
            pool.put(*update)
    with torch.no_grad():
        pool.put(leaf, leaf)
    keys, _, _ = pool.get()
    assert not keys.requires_grad
