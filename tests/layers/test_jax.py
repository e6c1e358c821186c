"""What is particular to JAX: donated buffers, padding, devices, and what compiles when."""

import subprocess
import sys
import weakref

import numpy as np
import pytest

from kvcache import KVCache, RotatingKVCache, get_backend

from .oracle import Oracle, Shape, check_whole, oracle_for, push

jax = pytest.importorskip("jax", reason="jax is not installed")
jnp = jax.numpy
pytestmark = pytest.mark.one_backend(name="jax")


def test_what_an_update_returned_is_gone_after_the_next():
    """Donated: using it raises, instead of showing what was overwritten."""
    cache, one = KVCache("jax"), jnp.ones((1, 2, 1, 4))
    keys, values = cache.update(one, one)
    cache.update(one, one)
    for old in (keys, values):
        assert old.is_deleted()
        with pytest.raises(RuntimeError, match="deleted"):
            np.asarray(old)
    assert not one.is_deleted(), "the update stays the caller's"


def test_reset_keeps_no_buffer():
    cache, one = KVCache("jax"), jnp.ones((1, 2, 1, 4))
    buffers = [weakref.ref(part) for part in cache.update(one, one)]
    cache.reset()
    assert [buffer() for buffer in buffers] == [None, None]


def test_growing_keeps_no_old_buffer():
    """The cache itself lets go of them at once: no other copy of its tokens stays with it."""
    cache, one = KVCache("jax", capacity=256), jnp.ones((1, 2, 256, 4))
    old = [weakref.ref(part) for part in cache.update(one, one)]
    cache.update(one, one)
    assert cache.growths == 1
    assert [part() for part in old] == [None, None]


def test_copies_outlive_their_source():
    for cache in (KVCache("jax"), RotatingKVCache(4, 1, "jax")):
        oracle = oracle_for(cache)
        push(cache, oracle, 6)
        twin, twins = cache.copy(), oracle.copy()
        push(cache, oracle, 1)
        cache.reset()
        check_whole(twin, twins)


def test_all_lengths_are_multiples_of_the_padding():
    shape, lengths = Shape(), set()
    cache, oracle = KVCache("jax", step=1), Oracle()
    for tokens in (1, 1, 254, 1, 1):
        lengths.add(len(push(cache, oracle, tokens, shape)))
    assert lengths == {256, 512}
    assert cache.positions.tolist() == [*range(258), *[-1] * 254]


def test_decoding_compiles_once_per_capacity():
    """Neither the position nor the length of the history is part of a program."""
    cache, one = KVCache("jax"), jnp.zeros((1, 1, 1, 6))
    cache.update(one, one)
    with jax.log_compiles(), _compilations() as compiled:
        for _ in range(20):
            cache.update(one, one)
    assert cache.offset == 21
    assert compiled == []


class _compilations:  # noqa: N801 - used as a function
    """Names of what JAX says that it compiles."""

    def __enter__(self):
        import logging

        self.names = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.names.append(record.getMessage())
        self.logger = logging.getLogger("jax")
        self.logger.addHandler(self.handler)
        return self.names

    def __exit__(self, *error):
        self.logger.removeHandler(self.handler)


TWO_DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, kvcache, numpy as np

one = [jax.device_put(jnp.ones((1, 2, 1, 4)), device) for device in jax.devices()]
assert kvcache.get_backend("jax").devices() == ["cpu:0", "cpu:1"]
for home in (0, 1):
    other = 1 - home
    named = kvcache.KVCache(f"jax:cpu:{home}")
    for cache in (kvcache.KVCache(), kvcache.RotatingKVCache(4), named):
        before = cache.backend
        for wrong in ((one[home], one[other]), *[(one[other], one[other])] * (before is not None)):
            try:
                cache.update(*wrong)
            except kvcache.DTypeError as error:
                assert "where this cache lives" in str(error), error
            else:
                raise SystemExit("arrays of two devices were accepted")
        assert cache.backend is before and cache.nbytes == 0 and cache.offset == 0
        for _ in range(6):
            keys, values = cache.update(one[home], one[home])
            assert keys.devices() == values.devices() == {jax.devices()[home]}
        try:
            cache.update(one[other], one[other])
        except kvcache.DTypeError:
            pass
        else:
            raise SystemExit("an array of another device was accepted later")
        assert cache.offset == 6
        mask = cache.mask(1)
        assert mask is None or mask.devices() == {jax.devices()[home]}
        assert cache.copy().state[0].devices() == {jax.devices()[home]}
        cache.update(one[home], one[home])
"""


def test_two_devices():
    done = subprocess.run(
        [sys.executable, "-P", "-c", TWO_DEVICES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_weak_types_and_numpy_scalars_are_no_trap():
    """`jnp.full` with a Python number makes a weakly typed array: the same dtype all the same."""
    cache = KVCache("jax")
    for _ in range(2):
        update = jnp.asarray(np.ones((1, 2, 1, 4), np.float32)) * 2
        cache.update(update, update)
        weak = jnp.broadcast_to(jnp.asarray(2.0), (1, 2, 1, 4))
        keys, _ = cache.update(weak, weak)
    assert bool((keys[:, :, :4] == 2).all())
    assert keys.dtype == jnp.float32
    assert get_backend("jax").dtype_name(keys) == "float32"
