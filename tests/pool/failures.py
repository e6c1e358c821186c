"""Failures of a framework, at the call that a test chooses."""

from __future__ import annotations

from contextlib import contextmanager

import pytest


class Failure(MemoryError):
    """Raised in place of a call of a backend."""


@contextmanager
def failing(monkeypatch, backend, hook, call):
    """Fails the `call`-th call of a hook, and expects the body to raise what that raised."""
    real, calls = getattr(backend, hook), 0

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Failure
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(backend, hook, counted)
        try:
            with pytest.raises(Failure):
                yield
        except pytest.fail.Exception:
            if calls >= call:
                raise
            pytest.fail(f"{hook} was called {calls} times only")


def fails_at_every_call(monkeypatch, backend, hooks, attempt, check):
    """Makes an attempt for every call of every hook, which fails it, and checks after each.

    Returns by hook how many calls there were. The last attempt of each hook succeeds.
    """
    counts = {}
    for hook in hooks:
        for call in range(1, 1000):
            real, calls = getattr(backend, hook), []

            def counted(*arguments, real=real, calls=calls, call=call, **options):
                calls.append(1)
                if len(calls) == call:
                    raise Failure
                return real(*arguments, **options)

            with monkeypatch.context() as patch:
                patch.setattr(backend, hook, counted)
                try:
                    attempt()
                except Failure:
                    failed = True
                else:
                    failed = False
            check(failed)
            if not failed:
                counts[hook] = call - 1
                break
    return counts
