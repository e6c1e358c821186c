"""Layers of a cache as transformers calls them, around the per-layer caches of kvcache."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from kvcache.errors import NotSupportedError
from kvcache.layers.growing import KVCache
from kvcache.layers.recurrent import StateCache
from kvcache.layers.rotating import RotatingKVCache


class AttentionLayer(CacheLayerMixin):
    """Keys and values of one layer, full or in a window."""

    is_compileable = False
    is_croppable = True

    def __init__(self, kv: KVCache) -> None:
        # Not that of the base class, which assigns to `keys` and `values`.
        self.kv = kv
        self.is_sliding = isinstance(kv, RotatingKVCache)
        self.record_past = False

    @property
    def rows(self) -> int:
        """Rows of the batch, 0 before the first token."""
        return self.kv.rows or 0

    def held(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values, ``[B, kv_heads, len, head_dim]``; None before the first token."""
        return cast(tuple[Tensor, Tensor], self.kv.state) if self.kv.offset else None

    # Attributes of the base class. Models read them: those with an encoder take its keys and values
    # from here, and some tell a first pass by `is_initialized`.

    @property
    def is_initialized(self) -> bool:
        return self.held() is not None

    @is_initialized.setter
    def is_initialized(self, _: bool) -> None:
        raise _read_only("is_initialized")

    @property
    def keys(self) -> Tensor | None:
        held = self.held()
        return None if held is None else held[0]

    @keys.setter
    def keys(self, _: Tensor | None) -> None:
        raise _read_only("keys")

    @property
    def values(self) -> Tensor | None:
        held = self.held()
        return None if held is None else held[1]

    @values.setter
    def values(self, _: Tensor | None) -> None:
        raise _read_only("values")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first update makes the buffers."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self.kv.update(key_states, value_states))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns of the update to come, and the position of the first."""
        stop = self.kv.offset + query_length
        columns = self.kv.next_positions(query_length).shape[-1] if self.is_sliding else stop
        return columns, stop - columns

    def get_seq_length(self) -> int:
        return self.kv.offset

    def get_max_length(self) -> int:
        return self.kv.max_size if isinstance(self.kv, RotatingKVCache) else -1


class StateLayer(LinearAttentionCacheLayerMixin):
    """The state of one recurrent layer: a convolution, and a recurrent state unless it has none.

    In a step of one token models write into the tensors that they were handed, and many call no
    method afterwards. So they are handed working copies, and the state of such a step is taken
    over, or **settled**, at the next call that concerns the layer.

    conv_only: whether there is no recurrent state. The state behind every token of a pass is then
        at hand, and the cache can go back to wherever it wants to.
    """

    supports_early_init = False
    is_compileable = False

    def __init__(self, states: StateCache, conv_only: bool = False) -> None:
        # Not that of the base class, which makes tensors of its own.
        self.states, self._conv_only = states, conv_only
        self.record_past = False
        self._working: tuple[Tensor, ...] = ()
        self._settled: tuple[Tensor, ...] = ()
        """State of the cache that the working copies are copies of."""
        self._written = 0
        """Version of the convolution's working copy when it was last settled."""
        self._coming = 0
        """Tokens of the pass that is not settled, if the model said how many."""

    @property
    def rows(self) -> int:
        """Rows of the batch, 0 before the first token."""
        return self.states.rows or 0

    @property
    def is_croppable(self) -> bool:
        return self._conv_only

    @property
    def is_filled(self) -> bool:
        """Whether there is a state to go on from."""
        return bool(self._coming or self.states.offset)

    def settle(self) -> None:
        """Take over the state of a pass that has ended since."""
        tokens = self._coming
        if not tokens and self._working and self._working[0]._version != self._written:
            tokens = 1  # written in place, which models do in steps of one token only
        if not tokens:
            return
        if self.states.state is not self._settled:
            self._coming = 0  # the cache was reset or changed since, and the pass with it
            return
        before, start = (self._coming, self._written), self.states.offset
        self._coming, self._written = 0, self._working[0]._version
        try:
            self.states.advance(tokens, *self._working)
            self._settled = cast(tuple[Tensor, ...], self.states.state)
        except BaseException:
            if self.states.offset == start:  # else it is settled; the copies are made anew
                self._coming, self._written = before
            raise

    def _in_step(self, working: tuple[Tensor, ...]) -> None:
        """Note that `working` are copies of the state of the cache."""
        self._working, self._settled = working, cast(tuple[Tensor, ...], self.states.state)
        self._written = working[0]._version if working else 0

    def handed(self, number: int) -> Tensor | None:
        """Return a working copy for the model to write to; None before the first token.

        number: 0 for the convolution, 1 for the recurrent state.
        """
        self.settle()
        state = cast(tuple[Tensor, ...], self.states.state)
        if state is not self._settled:  # the cache went back, was restored, or its rows selected
            with torch.inference_mode(False):  # inference tensors have no version
                self._in_step(tuple([array.clone() for array in state]))
        return self._working[number] if number < len(self._working) else None

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
    ) -> None:
        """Do nothing: the first pass brings the state."""

    def update_conv_state(
        self,
        conv_states: Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Take the inputs of a convolution, ``[B, channels, tokens]``; return earlier ones, too."""
        check_single(state_idx)
        past, tokens = self.handed(0), conv_states.shape[-1]
        if past is None:
            past = conv_states.new_zeros((*conv_states.shape[:-1], conv_kernel_size or tokens))
        size, columns = past.shape[-1], torch.cat([past, conv_states], -1)
        if self._conv_only:
            start = self.states.offset
            for position in self.states.cuts(tokens):
                behind = position - start
                self.states.record(position, columns[..., behind : behind + size])
        with torch.inference_mode(False):
            latest = columns[..., -size:].clone()
        # One statement: no signal handler runs in between.
        self._working, self._coming = (latest, *self._working[1:]), tokens
        if self._conv_only:
            self.settle()
        return columns

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        """Take the state behind the tokens of the pass."""
        check_single(state_idx)
        if not self._working:
            raise NotSupportedError(
                "a recurrent layer tells its tokens by update_conv_state; this one called "
                "update_recurrent_state alone. Use the library's DynamicCache for this model."
            )
        self._working = (self._working[0], recurrent_states)
        self.settle()
        return recurrent_states


class HybridLayer(StateLayer, AttentionLayer):
    """A layer with keys and values, and with a state."""

    is_croppable = False

    def __init__(self, kv: KVCache, states: StateCache) -> None:
        AttentionLayer.__init__(self, kv)
        StateLayer.__init__(self, states)

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Do nothing: the first pass brings keys, values and state."""


def check_single(state_idx: int | None) -> None:
    """Raise NotSupportedError for another state of a layer than its first."""
    if state_idx:
        raise NotSupportedError(
            f"a recurrent layer has one state; got state_idx={state_idx}. Use the library's "
            "DynamicCache for this model."
        )


def _read_only(name: str) -> AttributeError:
    return AttributeError(f"{name} tells what the cache holds; update, crop and reset change that.")
