"""The one place where tests look at private state of the library.

Everything else in the tests goes through the public interface. Where a test has to know more (that
nothing leaks, which cells hold what, whether memory was shared), it asks a function here, so that
a change of the insides changes one file.
"""

from contextlib import contextmanager

import numpy as np

from kvcache.stores import NEVER
from kvcache.stores.unlinking import Unlinking

# Pools.


def table(cache):
    """The table of cells of a causal cache."""
    return cache._pool.table


def buffers(cache):
    """The device side of a causal cache."""
    return cache._pool.buffers


def layers(cache):
    """The buffers of a causal cache by layer, as they lie: taken back and written."""
    return buffers(cache)._settled()


def pins(cache):
    """The rows that snapshots and resume points keep in the cells of a causal cache."""
    return cache._pool.pins


def pinned_rows(cache):
    """The rows that are pinned now."""
    return pins(cache)._rows


def pin_references(cache):
    """By cell: how many rows pin it."""
    return pins(cache)._references


def retained_rows(cache):
    """The rows that resume points retain, of every sequence that has some."""
    points = pins(cache)._points.values()
    return [point.retained for point in points if point.retained is not None]


def unreached(cache):
    """The sequences with positions that are still scheduled."""
    return pins(cache)._unreached


def forward_pass(cache):
    """The pass under way of a causal cache, or None."""
    return cache._pool.passes.current


def reads(cache):
    """The plan by which attention reads the cells of the pass under way."""
    return forward_pass(cache).reads


def poison(cache, cells, number):
    """Fills cells of every layer with a number that no put would store, past all checks."""
    pool = buffers(cache)
    for layer, arrays in layers(cache).items():
        filled = []
        for array, axis in zip(arrays, pool._token_axes, strict=False):
            host = pool.backend.to_host(array)
            host[(slice(None),) * axis + (np.asarray(cells, int),)] = number
            filled.append(pool.backend.from_host(host))
        pool._layers[layer] = tuple(filled)


def maybe_expired(cache):
    """The sequences that were stored to since they were last trimmed."""
    return cache._pool.maybe_expired


def tokens_retained(cache):
    """How many tokens a causal cache keeps per sequence, None for all."""
    return cache._pool.retained


def resumed(cache):
    """The rule for going on of a causal cache."""
    return cache._pool.resumed


def config(cache):
    """The config of a causal cache, as its backend or its model chose it."""
    return cache._pool.config


def units(table):
    """What hands out cells of a table: its allocator, or that of its pages."""
    return getattr(table.allocator, "pages", table.allocator)


def free_stack(table):
    """The stack of free cells or pages of a table, and of those claimed since they were stacked."""
    allocator = units(table)
    return allocator._stack[: allocator._top]


def stacked(table):
    """By cell or page: whether it lies on that stack."""
    return units(table)._stacked


# Encoders.


def entries(cache):
    """The encoder output by sequence."""
    return cache._stored()


def set_output_position(cache, sequence, position):
    """Puts the output of a sequence of an encoder cache somewhere else."""
    entry = cache._stored()[sequence]._replace(position=position)
    cache._entries = {**cache._entries, sequence: entry}
    if sequence in cache._arriving:
        cache._arriving[sequence] = position


def store_unfinished(cache):
    """Stores what the current pass of an encoder cache has put, although layers are missing."""
    cache._known &= cache._put_layers


def arriving(cache):
    """The sequences of which an encoder cache will store what the current pass puts."""
    return cache._arriving


def encoder_batch(cache):
    """The batch of the pass under way, or None."""
    return cache._batch


# Recurrent states in pools.


def state_rows(cache):
    """The rows that snapshots pin in a recurrent cache."""
    return [] if cache._slots is None else [*cache._slots._pinned]


def free_slots(cache):
    """How many slots no sequence, snapshot or pass of a recurrent cache has."""
    held = {slot for slots in cache._history().values() for slot in slots.values()}
    reserved = {slot for state_pass in cache._known.begun for slot in state_pass.slots}
    return len({*range(1, cache._slots.count)} - held - cache._slots.pinned - reserved)


# Per-layer caches.


def layer_pins(cache):
    """The rows that snapshots pin in the buffers of a per-layer cache."""
    return cache._pins.rows if cache._pins is not None else {}


def layer_pins_of(owner):
    """The rows that the owner of a per-layer cache's rows knows."""
    return owner.rows


def layer_retained(cache):
    """The rows that resume points retain of a per-layer cache, or None."""
    return getattr(cache._points, "retained", None)


def checkpoint(cache):
    """The open checkpoint of a per-layer cache, or None."""
    return cache._checkpoint


def room(cache):
    """The number of cells of a causal cache without a sequence: as many tokens can be stored."""
    return int((~table(cache).referenced_by_others(pin_references(cache), None)).sum())


def layer_points(cache):
    """The resume points of a per-layer cache."""
    return cache._points


# Backends.


def keeping_result(program):
    """A program that consumes arguments, as the JAX adapter calls it."""
    from kvcache.backends.interrupts import keeping_result

    return keeping_result(program)


def slots_of(owner):
    """The slots of rows that were copied out of a per-layer cache."""
    return owner._buffers.capacity


# Policies.


def returns(policy):
    """The observations of a policy that learns."""
    return policy._returns


# Stores.


@contextmanager
def writing(store, item):
    """Within, a store of files writes an item: its row is there, its file is not."""
    with store._directory.writing(item.key):
        with Unlinking() as unlinking, store._changing(NEVER) as index:
            assert store._reserve(index, item, item.nbytes, unlinking) is None
        yield
    store._settle_soon(NEVER)


# Stores behind prefix caches.


def fetching(prefix):
    """The queue of a prefix cache for what is being fetched."""
    return prefix._requests.store_link.tier._fetcher.queue


def fill_queue(prefix, job):
    """Let a job take all the room of the queue for what is to be put into the store."""
    queue = prefix._requests.store_link.tier._writer.queue
    assert queue.submit(job, queue._limit)


def cost_gate(prefix):
    """The measured costs of a prefix cache and its store."""
    return prefix._requests.store_link.tier.record.gate


def make_older(gate, seconds):
    """Let the measurement of a store be so many seconds older."""
    gate._measured -= seconds


def jobs_of(background):
    """The queue of jobs in the background."""
    return background._jobs


# Benchmarks.


def received(stream):
    """The places to which the peer of a stream receives values."""
    return stream._kept or [stream._place]


def store_of(puts):
    """The store that puts of a benchmark go to."""
    return puts._store


# Retention in prefix caches.


def retention_steps(index):
    """The entries of an index for times at which levels fall, stale ones among them."""
    return index._candidates.steps._heap


def watch_evictions(prefix, callback):
    """Calls `callback` with every span about to be evicted."""
    index = prefix._index
    told = index._on_evict

    def both(span):
        callback(span)
        told(span)

    index._on_evict = both
