"""What every test of a benchmark shares."""

import pytest

from kvcache.bench.harness import timing


@pytest.fixture(autouse=True, scope="session")
def _all_take_every_turn():
    """The slow as well: whether somebody is depends on what else this machine does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SLOW_EVERY", 1)
        yield
