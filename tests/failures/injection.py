"""Failures at a chosen moment: the n-th call of a hook, or the n-th line of the package."""

from __future__ import annotations

import ast
import inspect
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path

import kvcache
from kvcache import Backend
from kvcache.backends.layers import LayerHooks

# Checks and look-ups, and primitives that do no more than check and call a hook. Whatever else a
# backend offers counts as a hook, so that a new one is covered without an entry here.
NOT_HOOKS = {
    *("dtype", "dtype_name", "owns", "fast_key", "requires_grad", "compile"),
    *("slice_update", "scatter", "gather", "slice", "from_dlpack"),
}
HOOKS = sorted(
    name
    for name, member in (vars(LayerHooks) | vars(Backend)).items()
    if inspect.isfunction(member) and not name.startswith("_") and name not in NOT_HOOKS
)
PACKAGE = tuple(
    f"{Path(module.__file__).parent}/" for module in (kvcache, sys.modules["kvcache.backends"])
)


class InjectedError(MemoryError):
    """A framework that runs out of memory."""


def fail(*_):
    """Raise as a framework does."""
    raise InjectedError("injected")


class Moments:
    """Moments of one call, counted from 1; at the one called `chosen`, `strike` is called.

    names: description of each moment so far. struck: the one that failed, None if none did.
    """

    def __init__(self, chosen=None, strike=fail):
        self.chosen, self.strike = chosen, strike
        self.names = []
        self.struck = None

    def pass_by(self, name):
        self.names.append(name)
        if len(self.names) == self.chosen:
            self.struck = name
            self.strike()


@contextmanager
def hooks(backends, moments):
    """Count every call of a hook of `backends` as a moment, before the hook does anything."""
    backends = list({id(backend): backend for backend in backends}.values())
    for backend in backends:
        for name in HOOKS:
            setattr(backend, name, _counted(getattr(backend, name), name, moments))
    try:
        yield
    finally:
        for backend in backends:
            for name in HOOKS:
                delattr(backend, name)


def _counted(hook, name, moments):
    @wraps(hook)
    def counted(*args, **kwargs):
        moments.pass_by(name)
        return hook(*args, **kwargs)

    return counted


def interrupt():
    """Raise as Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


def send_signal():
    """Press Ctrl-C: Python raises at the next place where it looks for signals, which is here."""
    signal.raise_signal(signal.SIGINT)


@contextmanager
def lines(moments):
    """Count every line of the package as a moment, before it runs."""

    def enter(frame, event, arg):
        return line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(frame, event, arg):
        code, number = frame.f_code, frame.f_lineno
        if event == "line" and number not in between_targets(code.co_filename):
            moments.pass_by((code.co_filename, number, code.co_name))
        return line

    previous = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(previous)


@cache
def between_targets(path):
    """Return the lines that begin between two targets of one assignment.

    No signal comes there: Python looks for signals at calls and jumps.
    """
    nodes = ast.walk(ast.parse(Path(path).read_text()))
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    tuples = [target.elts for target in targets if isinstance(target, ast.Tuple)]
    return {later.lineno for first, *others in tuples for later in others} - {
        first.lineno for first, *_ in tuples
    }


def shown(name):
    """Return the name of a moment for people."""
    if isinstance(name, str):
        return name
    path, line, function = name
    return f"{Path(path).parent.name}/{Path(path).name}:{line} {function}"


def numbered(names):
    """Return names of moments, with the number of each among those of the same name."""
    counts = Counter()
    for name in names:
        counts[name] += 1
        yield f"{shown(name)} {counts[name]}"


def chosen_of(names, limit):
    """Return the numbers of at most `limit` moments, spread evenly over the names; None: of all.

    Of moments with one name, such as those of a loop, only the first and the last count.
    """
    if limit is None:
        return list(range(1, len(names) + 1))
    places = {}
    for number, name in enumerate(names, 1):
        first, _ = places.get(name, (number, number))
        places[name] = first, number
    numbers = sorted({number for pair in places.values() for number in pair})
    step = max(1, -(-len(numbers) // limit))
    return numbers[::step]
