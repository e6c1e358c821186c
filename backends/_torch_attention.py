"""Attention by the kernels of torch."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import array_api_compat.torch
import numpy as np
import torch

from .arrays import Namespace, NativeArray, NativeArrays
from .blocks import BlockReads, Blocks, attend_eagerly, dim_axis
from .products import Result, Scoring, VisibleColumns

_FEW = 8
"""Masked queries up to which one product for a whole key head beats one for each query head."""
MASKED = 256
"""Queries that share a mask."""

_FLASH_DIM = 256
"""Largest head_dim of FlashAttention."""

_ONE_DNN = 1 << 22
"""Multiplications for a key head from which products by oneDNN beat a kernel of torch."""
_SCORES = 1 << 20
"""Scores that these products hold at once: 4 MiB."""

_kernel = torch.nn.functional.scaled_dot_product_attention
_linear: Callable[..., NativeArray] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""A matrix times another one transposed, by oneDNN; None in a torch without it."""


def attend(
    q: NativeArray,
    keys: NativeArray,
    values: NativeArray,
    scale: float,
    visible: VisibleColumns | None,
) -> NativeArray:
    """Return attention by the kernel that torch chooses."""
    (q4, k4, v4), mask, causal = _kernel_form(q, keys, values, visible)
    return _kernel(q4, k4, v4, mask, is_causal=causal, scale=scale).reshape(q.shape)


def attend_to_runs(
    q: NativeArray,
    keys: NativeArray,
    values: NativeArray,
    scale: float,
    runs: Sequence[tuple[int, int]],
) -> NativeArray:
    """Return attention of query i over ``runs[i]``; with few calls for each, which count here."""
    q_heads, tokens, dim = q.shape
    kv_heads = keys.shape[0]
    # By token: the queries of a key head are the rows of one product, as below.
    queries = q.transpose(0, 1).reshape(tokens, 1, kv_heads, q_heads // kv_heads, dim).unbind()
    k4, v4 = keys[None], values[None]
    outputs = [
        _kernel(
            query,
            k4.narrow(2, start, stop - start),
            v4.narrow(2, start, stop - start),
            scale=scale,
        )
        for query, (start, stop) in zip(queries, runs, strict=True)
    ]
    return torch.cat(outputs).reshape(tokens, q_heads, dim).transpose(0, 1)


def serves_all_runs(q: NativeArray, keys: NativeArray, values: NativeArray) -> bool:
    """Return whether :func:`attend_to_all_runs` can be used."""
    dim = q.shape[-1]
    return bool(
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and dim == values.shape[-1]
        and dim % 8 == 0
        and dim <= _FLASH_DIM
        and keys.stride(-1) == values.stride(-1) == 1
    )


def attend_to_all_runs(
    q: NativeArray,
    keys: NativeArray,
    values: NativeArray,
    scale: float,
    runs: Sequence[tuple[int, int]],
) -> NativeArray:
    """Do :func:`attend_to_runs` by one call, which reads every run where it lies.

    FlashAttention (Dao 2023) for sequences of any length takes where the keys of each begin; given
    their lengths as well, they need not follow each other.
    """
    places = _on_device(tuple(runs), q.device)
    out, *_ = torch.ops.aten._flash_attention_forward(
        q.transpose(0, 1),
        keys.transpose(0, 1),
        values.transpose(0, 1),
        places.queries,
        places.starts,
        1,
        max(stop - start for start, stop in runs),
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=places.lengths,
    )
    return out.transpose(0, 1)


class _Places(NamedTuple):
    """Runs on a device, int32. queries: first query of each, and the number of all."""

    starts: NativeArray
    lengths: NativeArray
    queries: NativeArray


@lru_cache(maxsize=4)  # all layers of a pass have the same
def _on_device(runs: tuple[tuple[int, int], ...], device: torch.device) -> _Places:
    bounds, count = np.array(runs, np.int32), len(runs)
    starts = np.append(bounds[:, 0], bounds[-1, 1])  # as long as `queries`
    lengths = bounds[:, 1] - bounds[:, 0]
    host = np.concatenate([starts, lengths, np.arange(count + 1, dtype=np.int32)])
    arrays = torch.from_numpy(host).to(device)
    return _Places(*torch.split(arrays, [count + 1, count, count + 1]))


class _KernelForm(NamedTuple):
    """Arguments of the kernels of torch: queries, keys and values with four axes, and a mask."""

    arrays: NativeArrays
    mask: NativeArray | None
    causal: bool


def _kernel_form(
    q: NativeArray, keys: NativeArray, values: NativeArray, visible: VisibleColumns | None
) -> _KernelForm:
    """Return arguments of a kernel, in which keys are read once for as many queries as possible."""
    (q_heads, tokens, dim), (kv_heads, columns, _) = q.shape, keys.shape
    group = q_heads // kv_heads
    mask = None if visible is None else torch.from_numpy(visible.mask(columns)).to(q.device)
    if visible is None or tokens <= _FEW:
        # The queries of a key head are the rows of one product.
        rows = q.reshape(1, kv_heads, group * tokens, dim)
        tiled = None if mask is None else mask.repeat(group, 1)
        return _KernelForm((rows, keys[None], values[None]), tiled, False)
    shape = kv_heads, group, columns, dim
    arrays = q.reshape(kv_heads, group, tokens, dim), keys[:, None].expand(shape)
    causal = is_square(tokens, keys, visible)
    return _KernelForm((*arrays, values[:, None].expand(shape)), None if causal else mask, causal)


def is_square(tokens: int, keys: NativeArray, visible: VisibleColumns) -> bool:
    """Return whether queries see columns as `is_causal` of torch has it: query i the first i + 1.

    For few of them a mask is quicker.
    """
    columns = int(keys.shape[1])
    return _FEW < tokens == columns and visible.causal(columns)


def gives_logarithm(q: NativeArray, visible: VisibleColumns | None) -> bool:
    """Return whether torch has a kernel for :func:`attend_with_logarithm`."""
    if q.device.type == "cpu":
        return True
    # On CUDA its masks would have to be aligned in memory, and its rows are.
    return bool(q.is_cuda) and visible is None and q.shape[-1] % 8 == 0


def attend_with_logarithm(
    q: NativeArray,
    keys: NativeArray,
    values: NativeArray,
    scoring: Scoring,
    visible: VisibleColumns | None,
) -> Result:
    """Return attention and the logarithms, by the kernel that torch calls itself."""
    if visible is None and _linear is not None and _multiplies(q, keys):
        out, logarithm = _attend_by_products(_linear, q, keys, values, scoring.scale)
        return _with_sinks(out, logarithm, scoring.sinks)
    (q4, k4, v4), mask, causal = _kernel_form(q, keys, values, visible)
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    # They take compact rows only. Those of layouts with the tokens last are not.
    arrays = [array if array.stride(-1) == 1 else array.contiguous() for array in (q4, k4, v4)]
    aten = torch.ops.aten
    if q.is_cuda:
        kernel = aten._scaled_dot_product_efficient_attention
        out, logarithm, *_ = kernel(*arrays, None, True, scale=scoring.scale)
        logarithm = logarithm[..., : q4.shape[2]]  # padded to a multiple of 32
    else:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        out, logarithm = kernel(*arrays, 0.0, causal, attn_mask=mask, scale=scoring.scale)
    return _with_sinks(out.reshape(q.shape), logarithm.reshape(q.shape[:2]), scoring.sinks)


def _with_sinks(out: NativeArray, logarithm: NativeArray, sinks: NativeArray | None) -> Result:
    """Return a result to which the logits of sinks are added, if there are any."""
    if sinks is None:
        return out, logarithm
    share = torch.sigmoid(logarithm - sinks.float()[:, None])
    return (out.float() * share[..., None]).to(out.dtype), None


def _multiplies(q: NativeArray, keys: NativeArray) -> bool:
    """Return whether :func:`_attend_by_products` can be used, and beats a kernel."""
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return False
    rows = q.shape[0] // keys.shape[0] * q.shape[1]
    return int(rows * keys.shape[1] * q.shape[2]) >= _ONE_DNN


def _attend_by_products(
    linear: Callable[..., NativeArray],
    q: NativeArray,
    keys: NativeArray,
    values: NativeArray,
    scale: float,
) -> tuple[NativeArray, NativeArray]:
    """Return attention over all columns, and the logarithms, a key head after the other.

    The kernel of torch multiplies by MKL, which takes twice the time of oneDNN on processors of
    AMD; this operation, which torch compiles layers to, is oneDNN's.
    """
    kv_heads, dim = keys.shape[0], values.shape[-1]
    rows = (q * scale).reshape(kv_heads, -1, q.shape[-1])
    out = q.new_empty((*rows.shape[:2], dim))
    logarithm = q.new_empty((*rows.shape[:2], 1))
    size = max(1, _SCORES // keys.shape[1])
    for head, arrays in enumerate(zip(rows, out, logarithm, strict=True)):
        own, own_values = keys[head], values[head].mT
        for part, part_out, part_log in zip(*(array.split(size) for array in arrays), strict=True):
            scores = linear(part, own, None, "none", [], "")
            largest = torch.amax(scores, -1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)
            torch.div(linear(weights, own_values, None, "none", [], ""), total, out=part_out)
            torch.add(largest, total.log_(), out=part_log)
    return out.reshape(*q.shape[:2], dim), logarithm.reshape(q.shape[:2])


def attend_in_blocks(
    q: NativeArray,
    buffers: NativeArrays,
    likes: NativeArrays,
    scoring: Scoring,
    reads: BlockReads,
) -> NativeArray:
    """Compute attention of a pass, in a program or outside."""
    blocks = [array for own in reads.blocks for array in own]
    scale, softcap, sinks, _ = scoring
    places = [reads.order, reads.inverse]
    return _in_blocks(q, [*buffers], [*likes], scale, softcap, sinks, [*places, *blocks])


# One operation for compilers, which do not look inside: it looks at values, as they cannot.
@torch.library.custom_op("kvcache::attend_in_blocks", mutates_args=())
def _in_blocks(
    q: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    likes: Sequence[torch.Tensor],
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    places: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Compute attention. places: order, inverse, and then the arrays of the blocks."""
    order, inverse, *arrays = places
    groups = [Blocks(*arrays[i : i + 4]) for i in range(0, len(arrays), 4)]
    reads = BlockReads(order, inverse, tuple(groups))
    xp = cast(Namespace, array_api_compat.torch)
    scoring, layer = Scoring(scale, softcap, sinks), (tuple(buffers), tuple(likes))
    out: torch.Tensor = attend_eagerly(xp, _read_rows, q, *layer, scoring, reads)
    return out.contiguous()


@_in_blocks.register_fake
def _shape_of(
    q: torch.Tensor, buffers: Sequence[torch.Tensor], likes: Sequence[torch.Tensor], *_: object
) -> torch.Tensor:
    width = buffers[-1].shape[dim_axis(likes[len(buffers) - 1])]
    return q.new_empty([width if i == dim_axis(likes[0]) else n for i, n in enumerate(q.shape)])


def _read_rows(buffer: NativeArray, index: NativeArray, axis: int, _: torch.dtype) -> NativeArray:
    return torch.index_select(buffer, axis, index)
