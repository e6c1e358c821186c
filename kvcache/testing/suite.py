"""The suite as a pytest class, to be derived from."""

from __future__ import annotations

from typing import ClassVar

import pytest

from kvcache.backends import HOST_DTYPES, Backend, get_backend
from kvcache.errors import DTypeError

from .checks import Check, refuses
from .run import suite


class BackendSuite:
    """Every check as a test. Derive from it and set `backend`, an instance or a name.

    known_gaps: reason by check name, with a dtype (``"dlpack_from_numpy-uint8"``) or without.
    These checks must fail: an entry that has become untrue is reported as an error.
    """

    backend: ClassVar[Backend | str]
    known_gaps: ClassVar[dict[str, str]] = {}

    @pytest.mark.parametrize("check", suite(), ids=str)
    def test_contract(self, check: Check) -> None:
        backend = get_backend(self.backend)
        if check.dtype not in backend.dtypes:
            pytest.skip(f"{backend.name} declares no {check.dtype}")
        gap = self.known_gaps.get(str(check), self.known_gaps.get(check.name))
        if gap is None:
            check.run(backend, check.dtype)
            return
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the gap looks like
            check.run(backend, check.dtype)
        pytest.xfail(gap)

    def test_missing_dtypes_are_refused(self) -> None:
        backend = get_backend(self.backend)
        for dtype in HOST_DTYPES.keys() - set(backend.dtypes):
            with refuses(DTypeError, dtype):
                backend.alloc((1,), dtype)
            with refuses(DTypeError, dtype):
                backend.from_host([1], dtype)
