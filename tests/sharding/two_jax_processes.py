"""One of two processes of JAX that decode together, run by `test_processes.py`.

python two_jax_processes.py RANK ADDRESS
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import kvcache
from kvcache import Batch, CausalCache, KVCache, RotatingKVCache, functional, get_backend

BATCH, HEADS, DIM, STEPS = 2, 4, 8, 9
RNG = np.random.default_rng(0)
KEYS, VALUES, QUERIES = RNG.normal(size=(3, BATCH, HEADS, STEPS, DIM)).astype(np.float32)


def attended(queries, keys, values, mask):
    scores = jnp.where(mask, queries @ keys.swapaxes(-1, -2), -jnp.inf)
    return jax.nn.softmax(scores, axis=-1) @ values


def everywhere(cache):
    """The mask of the last token, all True for None."""
    mask = cache.mask(1)
    return True if mask is None else mask


def decode_eagerly(cache, put):
    outputs = []
    for step in range(STEPS):
        k, v, q = (put(array[:, :, step : step + 1], "bhtd") for array in (KEYS, VALUES, QUERIES))
        outputs.append(jax.jit(attended)(q, *cache.update(k, v), everywhere(cache)))
    return outputs


def decode_growing(backend, put):
    return decode_eagerly(KVCache(backend, step=4), put)


def decode_ring(backend, put):
    return decode_eagerly(RotatingKVCache(5, 1, backend), put)


def decode_in_a_program(backend, put):
    def step(state, k, v, q):
        state, keys, values = functional.append(state, k, v)
        return state, attended(q, keys, values, functional.mask(state, 1))

    program = jax.jit(step, donate_argnums=0)
    state = functional.empty([(BATCH, HEADS, 16, DIM)] * 2, "float32", backend=backend)
    outputs = []
    for i in range(STEPS):
        k, v, q = (put(array[:, :, i : i + 1], "bhtd") for array in (KEYS, VALUES, QUERIES))
        state, out = program(state, k, v, q)
        outputs.append(out)
    return outputs


def decode_in_a_pool(backend, put):
    cache = CausalCache(window=4)
    cache.init(backend, "float32", max_sequences=1, capacity=16, max_batch=4)
    cache.allocate([0], HEADS, DIM)

    def step(state, plan, k, v, q):
        state = functional.put(state, plan, 0, k, v)
        return state, attended(q, *functional.get(state, plan, 0))

    program, outputs = jax.jit(step, donate_argnums=0), []
    for i in range(STEPS):
        k, v, q = (put(array[0, :, i : i + 1], "htd") for array in (KEYS, VALUES, QUERIES))
        cache.program_state, out = program(
            cache.program_state, cache.plan(Batch([i], [0])), k, v, q
        )
        outputs.append(out)
    return outputs


def check_parts(outputs, expected):
    """Each process has its part of what one process computes."""
    for out, whole in zip(outputs, expected, strict=True):
        for shard in out.addressable_shards:
            np.testing.assert_allclose(
                shard.data, np.asarray(whole)[shard.index], rtol=1e-5, atol=1e-6
            )


def main(rank, address):
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    assert (len(jax.devices()), len(jax.local_devices())) == (4, 2)
    alone = get_backend("jax")
    # The second process would not reach the first device of all.
    assert alone.device == f"cpu:{jax.local_devices()[0].id}"
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    for spec in (PartitionSpec(None, ("data", "model")), PartitionSpec("data", "model")):
        backend = get_backend("jax", sharding=NamedSharding(mesh, spec))
        for decode in (decode_growing, decode_ring, decode_in_a_program, decode_in_a_pool):
            expected = decode(alone, alone.from_host_axes)
            outputs = decode(backend, backend.from_host_axes)
            assert not outputs[0].is_fully_addressable
            check_parts(outputs, expected)

    cache = KVCache(backend)
    new = backend.from_host_axes(KEYS, "bhtd")
    cache.update(new, new)
    snapshot = cache.snapshot()
    with pytest.raises(kvcache.NotSupportedError, match="process_allgather"):
        snapshot.save("nowhere")
    assert cache.offset == STEPS
    np.testing.assert_array_equal(backend.to_host(cache.mask(2)).sum(), 2 * STEPS - 1)

    # Divided over the devices of one process, and the same in the other: each can read it all.
    local = get_backend("jax", sharding=NamedSharding(mesh, PartitionSpec(None, "model")))
    cache = KVCache(local)
    new = local.from_host_axes(KEYS, "bhtd")
    cache.update(new, new)
    for array in cache.state:
        np.testing.assert_array_equal(local.to_host(array), KEYS)
    assert snapshot.stop == STEPS


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
