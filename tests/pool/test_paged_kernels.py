"""Kernels of others for paged attention, given our pages and block tables, against a slow oracle.

What a sequence should attend to is kept in plain lists. Half of the values tell sequence and
position, so that a page of another sequence, or a slot beside, is far off.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvcache import Batch, CacheConfig, CausalCache, functional, get_backend

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 16
WINDOWS = [None, pytest.param(20, marks=pytest.mark.matrix), 37]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


class Served:
    """A cache in pages, and what it should hold.

    kernel: attends for the queries of a pass. checked: numbers of the passes that it is asked
    about, where it compiles for every shape; None for all.
    """

    def __init__(self, backend, axes, kernel, window, checked=None):
        self.backend, self.axes, self.kernel, self.window = backend, axes, kernel, window
        self.checked, self.passes = checked, 0
        self.cache = CausalCache(window=window, page=PAGE)
        self.cache.set_config(CacheConfig(key_layout=axes, value_layout=axes))
        self.cache.init(backend, max_sequences=6, capacity=96, max_batch=160)
        self.held = [[] for _ in range(6)]
        self.rng = np.random.default_rng(0)

    def forward(self, **counts):
        """A pass with so many tokens of each sequence, ``s3=5``, checked against the oracle."""
        ids = [int(name[1:]) for name in counts]
        sequences = np.repeat(ids, [*counts.values()])
        positions = np.concatenate(
            [len(self.held[s]) + np.arange(n) for s, n in zip(ids, counts.values(), strict=True)]
        )
        q, k, v = (
            self.rng.normal(size=(heads, positions.size, DIM)).astype(np.float32)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        v[..., 0] = 1 + positions / 10 + sequences * 100
        self.cache.start_forward(Batch(positions.tolist(), sequences.tolist()))
        self.cache.put(*(self.turned(array) for array in (k, v)))
        for token, sequence in enumerate(sequences):
            self.held[sequence].append((k[:, token], v[:, token]))
        self.passes += 1
        if self.checked is not None and self.passes - 1 not in self.checked:
            return
        tokens = zip(q.swapaxes(0, 1), sequences, positions, strict=True)
        self.expected = np.stack([self.attended(*token) for token in tokens], 1).astype(np.float32)
        np.testing.assert_allclose(self.kernel(self, q), self.expected, **CLOSE)

    def turned(self, array):
        order = ["htd".index(axis) for axis in self.axes]
        return self.backend.from_host(np.ascontiguousarray(array.transpose(order)))

    def attended(self, q, sequence, position):
        """The slow way, for one token."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        keys, values = (
            np.stack([pair[i] for pair in self.held[sequence][first : position + 1]]).astype(float)
            for i in (0, 1)
        )
        out = []
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = keys[:, kv] @ q[head] / np.sqrt(DIM)
            weights = np.exp(scores - scores.max())
            out.append(weights @ values[:, kv] / weights.sum())
        return np.stack(out)

    def copy(self, source, target, length):
        self.cache.copy_prefix(source, target, length)
        self.held[target] = self.held[source][:length]

    def remove(self, sequence, start=0):
        self.cache.remove(sequence, start)
        del self.held[sequence][start:]


def serve(served):
    """Uneven prompts, mixed passes, shared prefixes, and pages freed and used again."""
    served.forward(s0=21, s1=40, s2=3)
    served.forward(s0=1, s3=50, s1=1)
    served.copy(1, 4, 41)
    served.copy(1, 5, 33 if served.window is None else 40)  # or what a window still holds
    served.forward(s0=1, s1=1, s2=1, s3=1, s4=1, s5=1)
    served.remove(0)
    served.remove(2)
    served.forward(s5=5, s2=34, s4=1, s0=18)
    served.remove(3, 49 if served.window is None else 50)
    for _ in range(18):
        served.forward(s0=1, s1=1, s2=1, s3=1, s4=1, s5=1)
    served.forward(s3=1)


# transformers.


def transformers_pages(served):
    """Indices to read and write as transformers' allocator makes them from a block table."""
    from transformers.generation.continuous_batching.cache_allocators.full_attention import (
        FullAttentionCacheAllocator,
    )

    table = served.cache.block_table(host=True)
    allocator = object.__new__(FullAttentionCacheAllocator)
    allocator.tokens_per_page = allocator.block_physical_stride = PAGE
    allocator.block_table = dict(enumerate(table.block_tables.tolist()))
    queries = np.diff(table.query_starts).tolist()
    pasts = (table.lengths - queries).tolist()
    requests = list(zip(allocator.block_table, pasts, queries, strict=True))
    writes = [i for request in requests for i in allocator.get_write_indices(*request)]
    assert writes == table.slot_mapping.tolist()
    return table, [i for request in requests for i in allocator.get_read_indices(*request)]


def transformers_kernel(forward):
    def kernel(served, q):
        import torch
        from transformers.generation.continuous_batching.utils import build_attention_mask

        table, reads = transformers_pages(served)
        keys, values = served.cache.buffers(0)
        keys, values = (
            array.view(-1, KV_HEADS, DIM)[reads].transpose(0, 1)[None] for array in (keys, values)
        )
        mask = torch.empty(1, 1, q.shape[1], len(reads))
        mask.fill_(torch.finfo(mask.dtype).min)
        starts, ends = table.query_starts.tolist(), [0, *np.cumsum(table.lengths).tolist()]
        build_attention_mask(mask, starts, ends, served.window or 1)
        module = torch.nn.Module()
        module.num_key_value_groups = HEADS // KV_HEADS
        out, _ = forward(module, torch.from_numpy(q)[None], keys, values, mask, scaling=DIM**-0.5)
        return out[0].transpose(0, 1).numpy()

    return kernel


@pytest.mark.cross_backend  # not of several, but only where all are together is transformers
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_paged_attention_of_transformers(name, window):
    pytest.importorskip("transformers.generation.continuous_batching")
    if name == "eager":
        from transformers.integrations.eager_paged import eager_paged_attention_forward as forward
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward as forward
    serve(Served(get_backend("torch"), "thd", transformers_kernel(forward), window))


# FlexAttention.


def flex_kernel(served, q):
    """torch's paged FlexAttention, one sequence of the batch per row."""
    import torch
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    table = served.cache.block_table()
    starts, lengths = table.query_starts.tolist(), table.lengths
    rows, width = table.block_tables.shape
    keys, values = served.cache.buffers(0, "HND")
    count = keys.shape[0]
    paged = PagedAttention(count, PAGE, rows, device="cpu")
    paged.page_table[:, :width] = table.block_tables
    for row in range(rows):
        pages = -(-int(lengths[row]) // PAGE)
        paged.physical_to_logical[row, table.block_tables[row, :pages].long()] = torch.arange(pages)
    longest = max(np.diff(starts))
    queries = torch.zeros(rows, HEADS, longest, DIM)
    for row in range(rows):
        tokens = slice(starts[row], starts[row + 1])
        queries[row, :, : tokens.stop - tokens.start] = torch.from_numpy(q[:, tokens])
    counts = torch.from_numpy(np.diff(starts))

    def visible(row, head, query, slot):
        position = lengths[row] - counts[row] + query
        seen = (slot <= position) & (slot < lengths[row])
        return seen if served.window is None else seen & (slot > position - served.window)

    logical = create_block_mask(visible, rows, None, longest, width * PAGE, "cpu", (16, PAGE))
    mask = paged.convert_logical_block_mask(logical)
    # [1, h, cells, d]: the pages side by side.
    keys, values = (a.transpose(0, 1).reshape(1, KV_HEADS, -1, DIM) for a in (keys, values))
    out = flex_attention(queries, keys, values, block_mask=mask, enable_gqa=True)
    parts = [out[row, :, : starts[row + 1] - starts[row]] for row in range(rows)]
    return torch.cat(parts, 1).numpy()


@pytest.mark.one_backend(name="torch")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", WINDOWS)
def test_flex_attention_with_a_page_table(window):
    pytest.importorskip("torch.nn.attention.experimental._paged_attention")
    serve(Served(get_backend("torch"), "htd", flex_kernel, window))


# JAX.


def pages_in_a_program(served):
    """Keys and values in pages, as a compiled program has them."""
    import jax

    state, plan = served.cache.program_state, served.cache.plan()
    read = jax.jit(lambda state, plan: functional.pages(state, plan, 0, PAGE))
    found = read(state, plan)
    served.cache.program_state = state
    return found


def ragged_kernel(served, q):
    """The reference of JAX's ragged paged attention: keys and values in turn, as one array."""
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    table = served.cache.block_table()
    keys, values = pages_in_a_program(served)
    pages = jnp.stack([keys, values], 3).reshape(*keys.shape[:2], 2 * KV_HEADS, DIM)
    out = kernel.ref_ragged_paged_attention(
        jnp.asarray(q.transpose(1, 0, 2)),
        pages,
        table.lengths,
        table.block_tables,
        table.query_starts,
        jnp.array([len(table.lengths)], jnp.int32),
        sm_scale=DIM**-0.5,
        sliding_window=served.window,
    )
    return np.asarray(out).transpose(1, 0, 2)


@pytest.mark.one_backend(name="jax")
@pytest.mark.parametrize(
    ("window", "checked"),
    [
        (None, {3}),  # of prompts, decode steps, shared prefixes and used pages
        pytest.param(None, {1, 2, 22}, marks=pytest.mark.matrix),
        pytest.param(37, {1, 3, 22}, marks=pytest.mark.matrix),
    ],
)
def test_ragged_paged_attention_of_jax(window, checked):
    pytest.importorskip("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
    serve(Served(get_backend("jax"), "thd", ragged_kernel, window, checked))


def decode_kernel(served, q):
    """JAX's paged attention for decode steps, interpreted: one token of each sequence.

    Of a pass with several, the last one of each is what the kernel computes; the others are taken
    from the oracle.
    """
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    table = served.cache.block_table(host=True)
    keys, values = pages_in_a_program(served)
    last = table.query_starts[1:] - 1
    width = -(-table.block_tables.shape[1] // 8) * 8  # the kernel takes pages by eights
    out = served.expected.copy()
    out[:, last] = np.asarray(
        paged_attention(
            jnp.asarray(q[:, last].transpose(1, 0, 2) * DIM**-0.5),
            keys.transpose(1, 0, 2, 3),
            values.transpose(1, 0, 2, 3),
            np.pad(table.block_tables, ((0, 0), (0, width - table.block_tables.shape[1]))),
            table.lengths,
            k_splits=1,
            interpret=True,
        )
    ).transpose(1, 0, 2)
    return out


@pytest.mark.one_backend(name="jax")
def test_paged_attention_of_jax_for_decode_steps():
    pytest.importorskip("jax.experimental.pallas.ops.gpu.paged_attention")
    serve(Served(get_backend("jax"), "htd", decode_kernel, None, {2}))
