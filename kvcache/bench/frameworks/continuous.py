"""Peer: the paged cache of transformers' continuous batching, read as it is without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from kvcache.backends.arrays import HostArray
from kvcache.bench.harness.contest import Case, UnavailableError

CONTINUOUS = "transformers continuous batching"
_PAGE = 256
"""Tokens of a page: the library's default."""

Update: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Writes the tokens of a pass, and returns what it reads: ``[1, heads, tokens, head_dim]`` each."""


def paged_pass(case: Case, queries: HostArray, rows: list[HostArray]) -> Callable[[], Tensor]:
    """Do :func:`decode_pass`.

    Raises: UnavailableError without transformers, with one that has its parts elsewhere, and where
        it finds too little memory for its mask.
    """
    try:
        return decode_pass(case, queries, rows)
    except ImportError as error:
        raise UnavailableError(f"{error}. pip install 'transformers>=5.24'") from error
    except MemoryError as error:
        raise UnavailableError(str(error)) from error


def decode_pass(case: Case, queries: HostArray, rows: list[HostArray]) -> Callable[[], Tensor]:
    """Return a pass over all `rows`, the last token of each being new.

    It writes these, gathers the tokens of all sequences into one run, and attends to all of it
    under a mask; the result is ``[1, tokens, query_heads, head_dim]``.

    Raises: ImportError without the parts of transformers.
    """
    from transformers.generation.continuous_batching.utils import build_attention_mask
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, new = _joined(case, [queries]), _joined(case, [row[:, -1:] for row in rows])
    update = _filled(case, q, rows)
    ends = [0, *np.cumsum([row.shape[1] for row in rows]).tolist()]
    hidden = torch.finfo(q.dtype).min
    mask = torch.full((1, 1, len(rows), ends[-1]), hidden, dtype=q.dtype, device=q.device)
    build_attention_mask(mask, list(range(len(rows) + 1)), ends)
    layer, scale = _Layer(q.shape[1] // case.heads), case.head_dim**-0.5

    def attend() -> Tensor:
        output: Tensor = sdpa_attention_forward(layer, q, *update(new, new), mask, scaling=scale)[0]
        return output

    return attend


class _Layer(torch.nn.Module):
    """The attribute of a model's attention layer that the library's kernel reads."""

    def __init__(self, query_heads_per_head: int) -> None:
        super().__init__()
        self.num_key_value_groups = query_heads_per_head


def _filled(case: Case, q: Tensor, rows: list[HostArray]) -> Update:
    """Return the update of a cache of one layer with the last token of each row, which it lacks."""
    from transformers import LlamaConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.distributed import DistributedHelper
    from transformers.generation.continuous_batching.requests import RequestState

    query_heads, lengths = q.shape[1], [row.shape[1] for row in rows]
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=query_heads,
        num_key_value_heads=case.heads,
        head_dim=case.head_dim,
        hidden_size=query_heads * case.head_dim,
    )
    settings = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=sum(math.ceil(length / _PAGE) for length in lengths),
        max_batch_tokens=len(rows),
        max_memory_percent=0.9,
    )
    cache = PagedAttentionCache(config, settings, q.device, DistributedHelper(None, None), q.dtype)
    requests = [RequestState(str(number), []) for number in range(len(rows))]

    def update(starts: list[int], stops: list[int], reads: bool) -> Update:
        read: list[int] = []
        write: list[int] = []
        for request, start, stop in zip(requests, starts, stops, strict=True):
            request.position_offset = start
            if not cache.can_store_request_tokens(request, stop - start):
                raise UnavailableError(f"its cache has no room for {stop} tokens")
            cache.extend_read_and_write_indices(
                request.request_id, start, stop - start, [read] if reads else None, [write]
            )
        indices = [torch.tensor(index, device=q.device) for index in (read, write)]
        counts = {"full_attention": torch.tensor([0, *np.cumsum(stops)], device=q.device)}

        def call(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            kwargs = {
                "read_index": [indices[0]],
                "write_index": [indices[1]],
                "cu_seq_lens_k": counts,
                "max_length_k": {"full_attention": max(stops)},
            }
            found: tuple[Tensor, Tensor] = cache.update(keys, values, 0, kwargs)
            return found

        return call

    last = [length - 1 for length in lengths]
    before = _joined(case, [row[:, :-1] for row in rows])
    update([0] * len(rows), last, reads=False)(before, before)
    return update(last, lengths, reads=True)


def _joined(case: Case, rows: list[HostArray]) -> Tensor:
    """Return all tokens of `rows`, ``[heads, tokens, head_dim]`` each, as a batch of one row."""
    joined = np.concatenate(rows, axis=1)[None]
    return cast(Tensor, case.backend.from_host(joined, case.dtype))
