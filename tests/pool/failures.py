"""Failures of a framework, at the call that a test chooses."""

from __future__ import annotations

from contextlib import contextmanager

import pytest


class InjectedError(MemoryError):
    """Raised in place of a call of a backend."""


@contextmanager
def injected(monkeypatch, backend, hook, call):
    """Fails the `call`-th call of a hook."""
    real, calls = getattr(backend, hook), []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise InjectedError
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(backend, hook, counted)
        yield


@contextmanager
def failing(monkeypatch, backend, hook, call):
    """Fails the `call`-th call of a hook, and expects that the body raises it."""
    with injected(monkeypatch, backend, hook, call), pytest.raises(InjectedError):
        yield


def failures_of(monkeypatch, backend, hook, attempt):
    """Yields after each attempt that failed, at the first call of a hook, the second, and so on.

    The last attempt succeeds.
    """
    for call in range(1, 100):
        try:
            with injected(monkeypatch, backend, hook, call):
                attempt()
        except InjectedError:
            yield call
        else:
            return
    pytest.fail(f"{hook} is called without end")
