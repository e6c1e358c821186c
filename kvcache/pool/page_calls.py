"""Calls of kernels for paged attention, beside `put` and `get`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias, get_args, overload

from kvcache._checks import as_index
from kvcache._locks import Lock
from kvcache._types import Int32s
from kvcache.backends import Array
from kvcache.errors import NotSupportedError

from .block_table import block_table, on_device
from .layouts import ArrayLayout, paged
from .passes import CellPool
from .plan import BlockTable

PageLayout: TypeAlias = Literal["NHD", "HND"]
"""Order of the axes of a page: N its slots, H kv_heads, D head_dim."""
_CONFIG_LAYOUTS = {"NHD": "thd", "HND": "htd"}


class PageCalls(ABC):
    """Pages and tables for kernels of paged attention, instead of :meth:`Cache.get`."""

    page: int
    """Cells of a page."""
    lock: Lock

    @property
    @abstractmethod
    def _pool(self) -> CellPool:
        """The pool of the cache. Raises: KVCacheError before ``init``."""

    @overload
    def block_table(self, *, host: Literal[False] = ...) -> BlockTable[Array]: ...
    @overload
    def block_table(self, *, host: bool) -> BlockTable[Array] | BlockTable[Int32s]: ...
    def block_table(self, *, host: bool = False) -> BlockTable[Array] | BlockTable[Int32s]:
        """Return the pages that the current pass reads, and the cells that it writes.

        In the middle of a pass, for all of its layers; copied to the device once.

        host: return NumPy arrays instead, shared by all calls of a pass: not to be changed.

        The order of positions, a window and chunks are for the kernel to apply; tokens that
        :meth:`Cache.set_causal` lets see ahead are not described.

        Raises: KVCacheError without a pass; NotSupportedError for a reserve pass, for a batch that
            is not sorted by sequence and position, and where positions are missing that a token of
            the pass would see.
        """
        pool = self._pool
        forward_pass = pool.current_pass()
        if forward_pass.block_table is None:
            with self.lock:  # other threads may change sequences, and so the table, during a pass
                forward_pass.block_table = block_table(forward_pass)
        if host:
            return forward_pass.block_table
        if forward_pass.device_table is None:
            forward_pass.device_table = on_device(forward_pass.block_table, pool.buffers.backend)
        return forward_pass.device_table

    def buffers(self, layer: int, layout: PageLayout = "NHD") -> tuple[Array, Array | None]:
        """Return the pages of a layer, keys and values: views of all its cells. O(1).

        layout: ``"NHD"``, ``[pages, page, kv_heads, head_dim]``, of a cache in layout ``"thd"``;
            or ``"HND"``, ``[pages, kv_heads, page, head_dim]``, of one in ``"htd"``.

        Valid until the next put. Do not write to them. Values are None for a layer of keys only.

        Raises: NotSupportedError where the pages would be a copy: in another layout, or on a
            backend without views (JAX; use :func:`kvcache.functional.pages` in a program).
            KVCacheError for a layer that was never put, ValueError for another layout.
        """
        pool, number = self._pool, as_index(layer, "layer")
        if layout not in get_args(PageLayout):
            raise ValueError(f"pages are in layout 'NHD' or 'HND'; got {layout!r}.")
        backend, arrays = pool.buffers.backend, pool.buffers.whole(number)
        for own in pool.buffers.layouts[: len(arrays)]:
            _check_layout(own, layout)
        if not backend.slices_are_views:
            raise NotSupportedError(
                f"pages on {backend.name} would be a copy of the whole layer. Take "
                "kvcache.functional.pages of program_state in a compiled program instead."
            )
        views = [
            paged(backend.xp, array, own.token_axis, self.page)
            for array, own in zip(arrays, pool.buffers.layouts, strict=False)
        ]
        return views[0], views[1] if len(views) > 1 else None


def _check_layout(own: ArrayLayout, layout: PageLayout) -> None:
    """Raise NotSupportedError unless a buffer in layout `own` has pages in `layout`."""
    wanted = _CONFIG_LAYOUTS[layout]
    if own.axes != wanted:
        raise NotSupportedError(
            f"pages in {layout} are views of a cache in layout {wanted!r}; {own.name} are in "
            f"{own.axes!r}. Call set_config(CacheConfig(key_layout={wanted!r}, "
            f"value_layout={wanted!r})) before init, or ask for the other layout."
        )
