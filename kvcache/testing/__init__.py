"""The conformance suites, for authors of backends and of stores.

With pytest::

    from kvcache.testing import BackendSuite

    class TestMine(BackendSuite):
        backend = MyBackend()

Without: ``kvcache conformance --backend mine``. Both run every check of
:mod:`~kvcache.testing.backend_checks`, :mod:`~kvcache.testing.attention_checks`,
:mod:`~kvcache.testing.cache_checks`, :mod:`~kvcache.testing.batch_checks`,
:mod:`~kvcache.testing.state_checks`, :mod:`~kvcache.testing.pool_layer_checks` and
:mod:`~kvcache.testing.pool_state_checks`, each for every dtype that the backend declares. The
docstring of a check is the rule that the backend must keep.

For stores, with pytest::

    from kvcache.testing import StoreSuite

    class TestMine(StoreSuite):
        def open_store(self, place, budget):
            return MyStore(place, budget)

It runs every check of :mod:`~kvcache.testing.store_checks`.

For caches of any kind, put behind a :class:`~kvcache.verify.Target`::

    from kvcache.testing import verify_reuse

    def test_my_cache():
        verify_reuse(MyTarget(), runs=20)

It raises AssertionError with a report where conversations over the cache give other logits than
cold runs of the same passes; see :mod:`kvcache.verify`.
"""

from kvcache.verify import verify_reuse

from .run import Result, run_suite

__all__ = ["BackendSuite", "Result", "StoreSuite", "run_suite", "verify_reuse"]


def __getattr__(name: str) -> object:
    # pytest is needed for these only.
    if name == "BackendSuite":
        from .suite import BackendSuite

        return BackendSuite
    if name == "StoreSuite":
        from .store_suite import StoreSuite

        return StoreSuite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
