"""Rotary position shifts of stored keys, for removal from the middle of a sequence."""

from __future__ import annotations

import operator
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from kvcache.backends import Array, Layout, backend_beside
from kvcache.backends.arrays import Namespace
from kvcache.errors import ShapeError
from kvcache.storage.layout import TOKEN_AXIS

Style: TypeAlias = Literal["half", "interleaved"]


class RoPEShift:
    """Rotation of keys to new positions: the `shift` of a :class:`CausalCache`.

    ::

        theta = 10_000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
        cache = CausalCache(shift=RoPEShift(theta))

    inverse_frequencies: radians per position of each pair of dimensions, as the model uses them
        (scaled, where it scales: linear, NTK, Llama 3, YaRN). n of them rotate 2 n dimensions of a
        head; others stay.
    style: which of these dimensions are a pair: ``"half"``, i and i + n (Hugging Face, GPT-NeoX),
        or ``"interleaved"``, 2 i and 2 i + 1 (GPT-J, GGUF).
    layout: that of the cache's keys.
    start: first of the rotary dimensions. DeepSeek's keys have them last: 128 in heads of
        ``[nope 128 | rope 64]``, 512 in latent keys of ``[latent 512 | rope 64]``.

    Layers with different frequencies take one of these each::

        local, everywhere = RoPEShift(local_frequencies), RoPEShift(global_frequencies)

        def shift(layer, keys, offsets):
            rotation = everywhere if layer % 6 == 5 else local
            return rotation(layer, keys, offsets)

    Rotary embedding is from RoFormer (arXiv:2104.09864). Rotations add up, so stored keys can be
    rotated on by the difference. Computed in float32 for keys of any dtype; angles on the host, in
    float64.

    Raises: ShapeError, ValueError.
    """

    def __init__(
        self,
        inverse_frequencies: npt.ArrayLike,
        style: Style = "half",
        layout: Layout = "htd",
        start: int = 0,
    ) -> None:
        self.inverse_frequencies = np.asarray(inverse_frequencies, np.float64)
        if self.inverse_frequencies.ndim != 1 or not self.inverse_frequencies.size:
            raise ShapeError(
                "there is one inverse frequency for each pair of dimensions; got shape "
                f"{self.inverse_frequencies.shape}."
            )
        if style not in get_args(Style):
            raise ValueError(f"a style is one of {get_args(Style)}; got {style!r}.")
        if layout not in TOKEN_AXIS:
            raise ValueError(f"a layout is one of {tuple(TOKEN_AXIS)}; got {layout!r}.")
        self.style = style
        self.layout = layout
        self.start = operator.index(start)
        if self.start < 0:
            raise ValueError(f"rotary dimensions start at 0 or later; got start={start}.")

    def __call__(self, layer: int, keys: Array, offsets: Array) -> Array:
        """Return `keys` moved by `offsets` positions, int32 [tokens], in shape and dtype of `keys`.

        Raises: ShapeError if rotary dimensions lie beyond head_dim, or if there is not one offset
            for each token: the keys are in another layout then.
        """
        backend = backend_beside(keys)
        xp, stop = backend.xp, self.start + 2 * self.inverse_frequencies.size
        axes = [self.layout.index(name) for name in "htd"]
        self._check(tuple(keys.shape), tuple(offsets.shape), stop)
        # On the host: float32 angles of far positions would lose the digits that matter.
        angles = np.outer(backend.to_host(offsets), self.inverse_frequencies)
        cos, sin = (backend.from_host(part(angles), "float32") for part in (np.cos, np.sin))
        x = xp.astype(xp.permute_dims(keys, tuple(axes)), backend.dtype("float32"))
        moved = self._rotated(xp, x[:, :, self.start : stop], cos, sin)
        if 2 * self.inverse_frequencies.size < x.shape[2]:
            moved = xp.concat([x[:, :, : self.start], moved, x[:, :, stop:]], axis=-1)
        back = tuple(int(axis) for axis in np.argsort(axes))  # the inverse permutation
        return xp.permute_dims(xp.astype(moved, keys.dtype), back)

    def _check(self, shape: tuple[int, ...], offsets: tuple[int, ...], stop: int) -> None:
        """Raise ShapeError unless keys of `shape` have a token per offset and `stop` dimensions."""
        sizes = dict(zip(self.layout, shape, strict=False))
        if len(shape) != 3 or offsets != (sizes["t"],):
            raise ShapeError(
                f"there is one offset for each token of keys in layout {self.layout!r} "
                f"(h kv_heads, t tokens, d head_dim); got offsets {offsets} for keys {shape}. Make "
                "the shift with the layout of the cache's keys: RoPEShift(..., layout=...)."
            )
        if stop > sizes["d"]:
            raise ShapeError(
                f"dimensions {self.start} to {stop - 1} rotate, but keys have a head_dim of "
                f"{sizes['d']}."
            )

    def _rotated(self, xp: Namespace, x: Array, cos: Array, sin: Array) -> Array:
        """Return `x` [heads, tokens, 2 n] with each pair rotated by its angle."""
        n = cos.shape[-1]
        if self.style == "half":
            a, b = x[:, :, :n], x[:, :, n:]
        else:
            pairs = xp.reshape(x, (*x.shape[:2], n, 2))
            a, b = pairs[:, :, :, 0], pairs[:, :, :, 1]
        rotated = [a * cos - b * sin, b * cos + a * sin]
        if self.style == "half":
            return xp.concat(rotated, axis=-1)
        return xp.reshape(xp.stack(rotated, axis=-1), x.shape)
