"""Layers of a cache with buffers of a fixed size, for compiled programs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from kvcache import functional
from kvcache.errors import CacheFullError
from kvcache.layers.growing import KVCache
from kvcache.layers.state import LayerState

from .layers import AttentionLayer

WRITTEN = ("keys", "values", "offset", "written")
"""Fields of a state that a program writes to, in place."""


class FixedLayer(AttentionLayer):
    """Keys and values of one layer in `slots` slots, all of which every update returns.

    What is held is in buffers that a program writes to, a state of :mod:`kvcache.functional`, from
    the first update until :meth:`settle`.

    sliding: whether masks hide tokens behind a window; they are held all the same.
    """

    is_compileable = True

    def __init__(self, kv: KVCache, slots: int, sliding: bool) -> None:
        super().__init__(kv)
        self.is_sliding, self._slots = sliding, slots
        self._state: LayerState | None = None

    def held(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values in all slots; None before there are any."""
        state = self._state
        if state is None:
            return super().held()
        return cast(Tensor, state.keys), cast(Tensor, state.values)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Tensors that a program writes to, by name: those to register for ``torch.export``.

        Empty before the first update, unless ``cache.early_initialization`` has made them.
        """
        state = self._state
        if state is None:
            return {}
        return {name: cast(Tensor, getattr(state, name)) for name in WRITTEN}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, for keys and values of these forms and any number of tokens."""
        kv = self.kv
        if kv.rows is None:
            kv.update(*(_one_token(array) for array in (key_states, value_states)))
            kv.trim(1)  # it told the sizes of a token
        self._state = cast(LayerState, kv.export_state(self._slots - kv.offset))
        if not torch.compiler.is_compiling():
            for buffer in self.buffers.values():
                torch._dynamo.mark_static_address(buffer)

    def settle(self) -> None:
        """Give the buffers back to the cache."""
        state = self._state
        if state is not None:
            self.kv.import_state(state)
            self._state = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self._state is None:
            self.lazy_initialization(key_states, value_states)
        state = cast(LayerState, self._state)
        appended, keys, values = functional.append(state, key_states, value_states)
        # In place, so that every call of a program finds its numbers at the same address.
        cast(Tensor, state.offset).copy_(cast(Tensor, appended.offset))
        cast(Tensor, state.written).copy_(cast(Tensor, appended.written))
        return cast(Tensor, keys), cast(Tensor, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of slots, and 0, the position of the first.

        Raises: CacheFullError on a CPU if the tokens do not fit; elsewhere that would wait for the
            device, and :attr:`ModelCache.caches` raises BoundsError later.
        """
        state = self._state
        seen = self.kv.offset if state is None else cast(Tensor, state.offset)
        at_hand = isinstance(seen, int) or (seen.is_cpu and not torch.compiler.is_compiling())
        if at_hand and int(seen) + query_length > self._slots:
            raise CacheFullError(
                f"offset + tokens must be <= capacity; got {int(seen)} + {query_length} > "
                f"{self._slots}. Raise capacity."
            )
        return self._slots, 0

    def get_seq_length(self) -> int:
        """Return the tokens seen: a tensor, as in the library, while a program has the buffers."""
        return self.kv.offset if self._state is None else cast(int, self._state.offset)

    def get_max_length(self) -> int:
        return self._slots


def _one_token(array: Tensor) -> Tensor:
    batch, heads, _, head_dim = array.shape
    return array.new_zeros((batch, heads, 1, head_dim))
