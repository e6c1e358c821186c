"""The rules of stores as a pytest class, to be derived from."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from kvcache.stores import Store

from .store_checks import STORE_CHECKS, StoreCheck
from .store_subject import Change, StoreSubject


class StoreSuite:
    """Every rule of stores as a test. Derive from it and write :meth:`open_store`.

    persistent: whether a store finds what an earlier one of the same place has put.
    has_budget: whether it holds a budget; else it is only asked for none.
    known_gaps: reason by name of a check that must fail: an entry that has become untrue is
        reported as an error.
    """

    persistent: ClassVar[bool] = True
    has_budget: ClassVar[bool] = True
    known_gaps: ClassVar[dict[str, str]] = {}

    def open_store(self, place: Path, budget: int | None) -> Store:
        """Return a store of the place, a directory that is empty at first, of one test alone.

        budget: of the store, in bytes.
        """
        raise NotImplementedError("derive from StoreSuite, and return a store.")

    def damage(self, store: Store, key: bytes, change: Change) -> None:
        """Replace the bytes that lie in the store under a key by ``change`` of them."""
        pytest.skip("nothing tells how values of this store are damaged")

    @pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
    def test_contract(self, check: StoreCheck, tmp_path: Path) -> None:
        place = tmp_path / "place"
        place.mkdir()
        subject = StoreSubject(
            lambda budget: self.open_store(place, budget),
            self.persistent,
            self.has_budget,
            self.damage,
        )
        gap = self.known_gaps.get(check.__name__)
        if gap is None:
            check(subject)
            return
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the gap looks like
            check(subject)
        pytest.xfail(gap)
