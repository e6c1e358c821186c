"""Buffers in the form for compiled programs, and what else programs above the caches ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from .arrays import Array, Arrays, TracedIndex

P = ParamSpec("P")
R = TypeVar("R")


class ProgramForms(ABC):
    """The part of a backend that makes and compiles programs.

    By default programs are run as they are, and buffers are in their form already.
    """

    @abstractmethod
    def alloc_axes(self, shape: Sequence[int], dtype: str, axes: str) -> Array:
        """See :meth:`Backend.alloc_axes`."""

    @abstractmethod
    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> Array:
        """See :meth:`Backend.from_host`."""

    def compile(self, function: Callable[P, R], donate: Sequence[int] = ()) -> Callable[P, R]:
        """Return `function`, of arrays and containers of arrays, compiled if that makes it faster.

        JAX compiles it once per shape of its arguments; eager frameworks return it unchanged. It
        has to be pure: everything it needs is an argument or a constant.

        donate: positions of arguments whose buffers it consumes, as :meth:`slice_update` does.
        """
        return function

    def traced_form(self, buffer: Array) -> Array:
        """Return `buffer` in the form for compiled programs (bits, if need be); consumes it.

        A buffer in that form already is returned unchanged. :meth:`from_traced` undoes that. The
        ``traced_`` functions below accept either form.
        """
        return buffer

    def from_traced(self, buffer: Array, dtype: str) -> Array:
        """Undo :meth:`traced_form` of a buffer of `dtype`, in either form; consumes it."""
        return buffer

    def traced_forms(self, buffers: Arrays) -> Arrays:
        """Do :meth:`traced_form` for all `buffers`; none is consumed if it raises."""
        return tuple(map(self.traced_form, buffers))

    def from_traced_forms(self, buffers: Arrays, dtype: str) -> Arrays:
        """Do :meth:`from_traced` for all `buffers`; none is consumed if it raises."""
        return tuple(self.from_traced(buffer, dtype) for buffer in buffers)

    def traced_zeros(self, shape: Sequence[int], dtype: str, axes: str = "") -> Array:
        """Return zeros in the form for compiled programs, made inside of a program or outside.

        axes: as in :meth:`alloc_axes`; without any, the whole array is on every device.
        """
        return self.traced_form(self.alloc_axes(shape, dtype, axes))

    def traced_range(self, stop: int) -> Array:
        """Return int32 ``[0, stop)``, made inside of a program or outside."""
        return self.from_host(np.arange(stop, dtype=np.int32))

    def traced_index(self, start: int | list[int]) -> TracedIndex:
        """Return host ints as an argument of programs, without recompilation when they change."""
        return start
