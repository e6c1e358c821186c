"""The conformance suite, for authors of backends.

With pytest::

    from kvcache.testing import BackendSuite

    class TestMine(BackendSuite):
        backend = MyBackend()

Without: ``kvcache conformance --backend mine``. Both run every check of
:mod:`~kvcache.testing.backend_checks`, :mod:`~kvcache.testing.cache_checks`,
:mod:`~kvcache.testing.batch_checks`, :mod:`~kvcache.testing.state_checks` and
:mod:`~kvcache.testing.pool_state_checks`, each for every dtype that the backend declares. The
docstring of a check is the rule that the backend must keep.
"""

from .run import Result, run_suite

__all__ = ["BackendSuite", "Result", "run_suite"]


def __getattr__(name: str) -> object:
    # pytest is needed for this one only.
    if name == "BackendSuite":
        from .suite import BackendSuite

        return BackendSuite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
