"""What every test shares: backends, the marks that choose its session, and Hypothesis.

Marks say where a test runs (the sessions of noxfile.py select by them, and by nothing else):

- ``one_backend(name="torch")``: about one backend, so it runs where that framework is alone. A test
  gets this mark by itself if exactly one framework is among its parameters: the `backend` fixture,
  any other parameter that is a backend or is the name of one, the attribute `backend` of its class.
  Tests of one framework without such a parameter are marked by hand. NumPy is always there, so it
  counts only where no framework is named; so does array-api-strict, which runs on it.
- ``cross_backend``: needs several frameworks in one process, so it runs where all are together. A
  test gets it by itself if its parameters and marks name several.
- ``model``: runs a real model, for minutes; where all are together.
- ``installation``: depends on what else is installed, so it runs in every session.
- ``docs``: about the documentation, so it runs where that is built.
- ``slow``: takes seconds; `nox -s quick` leaves it out.
- ``matrix``: too much for every change: most cells of a matrix, which `nox -s adapters` runs, and
  what needs packages or sources of engines, or a minute, which `nox -s engines` runs.

A test without any of the first five knows NumPy at most. It runs on NumPy alone, and where all are
together if it was skipped there, for want of a package; or if that session did not run before.
`nox -s complete` fails if a test ran nowhere.

A framework or device that is missing shows as one skipped test that says why, and how many more
need it. ``HYPOTHESIS_PROFILE=thorough`` looks for counterexamples at random and long; by default
it is the same few every time.
"""

import gc
import json
import os
import signal
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from kvcache import Backend, get_backend

BACKENDS = ("numpy", "torch", "jax", "mlx", "array_api:array_api_strict", "torch:cuda", "jax:gpu")
PLACES = ("one_backend", "cross_backend", "model", "installation", "docs")
RUNS_ON = {"array_api": "numpy"}  # array-api-strict, which has no arrays of its own

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", max_examples=60, derandomize=True, deadline=None, suppress_health_check=SLOW
)
settings.register_profile(
    "thorough", max_examples=3000, deadline=None, print_blob=True, suppress_health_check=SLOW
)
# For what other sessions test as well: enough to see that the machinery runs.
settings.register_profile("brief", settings.get_profile("ci"), max_examples=20)
settings.register_profile(  # whether a test fails is all that counts: nothing is shrunk
    "mutation",
    settings.get_profile("ci"),
    max_examples=50,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="session")
def _no_backend_from_the_environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVCACHE_BACKEND", raising=False)
        yield


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request):
    """Each backend in turn."""
    return get_backend(request.param)


def pytest_configure(config):
    """Writes a record of this run where $KVCACHE_RECORD says."""
    # Tests send themselves Ctrl-C; a shell that starts them in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # nothing of what is collected goes
    path = os.environ.get("KVCACHE_RECORD")
    if path and not hasattr(config, "workerinput"):  # xdist's workers report to the one process
        config.pluginmanager.register(Record(Path(path)))


def pytest_collection_finish(session):
    """Keeps the garbage collector off tests and frameworks: an eighth of the time of all tests.

    They are half a million objects, and stay.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


class Record:
    """Which tests ran, or why not: `nox -s complete` compares the records of all sessions."""

    def __init__(self, path):
        self.path = path
        self.tests = {}

    def pytest_collectreport(self, report):
        if report.skipped:  # a whole file
            self.tests[report.nodeid] = f"skipped: {report.longrepr[2]}"

    def pytest_collection_finish(self, session):
        for item in session.items:
            self.tests[item.nodeid] = "collected"

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.tests[report.nodeid] = f"skipped: {report.longrepr[2]}"
        elif report.when == "call":
            self.tests[report.nodeid] = "ran"

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.tests, indent=0))


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Marks tests before `-m` selects, and then looks for those that cannot run here."""
    for item in items:
        mark(item)
    # Half a minute each: begun last, as by name, they would keep one process busy alone.
    items.sort(key=lambda item: item.path.parent.name != "sharding")
    result = yield
    leave_out_what_ran(config, items)
    leave_one_of_each_missing(config, items)
    return result


def mark(item):
    """Marks a test that is about one framework, or about several."""
    marked = {mark.kwargs["name"] for mark in item.iter_markers("one_backend")}
    names = marked | frameworks_of(item)
    frameworks = names - {"numpy"} or names
    if item.get_closest_marker("cross_backend") or len(frameworks) > 1:
        item.add_marker("cross_backend")
    elif frameworks and not marked:
        item.add_marker(pytest.mark.one_backend(name=frameworks.pop()))


def parameters_of(item):
    """The parameters of a test; its backend may be an attribute of its class instead."""
    inherited = {"backend": getattr(getattr(item, "cls", None), "backend", None)}
    return inherited | getattr(getattr(item, "callspec", None), "params", {})


def frameworks_of(item):
    """The frameworks among the parameters of a test."""
    found = parameters_of(item).values()
    names = {value.name for value in found if isinstance(value, Backend)}
    strings = [value for value in found if isinstance(value, str) and value in BACKENDS]
    names |= {string.partition(":")[0] for string in strings}
    return {RUNS_ON.get(name, name) for name in names}


def leave_out_what_ran(config, items):
    """Leaves out tests without marks that ran on NumPy alone: $KVCACHE_RAN is the record of it."""
    path = os.environ.get("KVCACHE_RAN")
    ran = json.loads(Path(path).read_text()) if path else {}
    deselect(
        config, items, {item for item in items if is_plain(item) and ran.get(item.nodeid) == "ran"}
    )


def is_plain(item):
    """Whether no mark says where a test runs."""
    return not any(item.get_closest_marker(name) for name in PLACES)


def deselect(config, items, gone):
    """Takes tests away, and has them counted as deselected."""
    if gone:
        config.hook.pytest_deselected(items=list(gone))
        items[:] = [item for item in items if item not in gone]


def leave_one_of_each_missing(config, items):
    """Of all tests on a backend that this machine lacks, leaves one, which is skipped."""
    groups = {}
    for item in items:
        spec = parameters_of(item)["backend"]
        if spec in BACKENDS and why_missing(spec):
            groups.setdefault(spec, []).append(item)
    gone = set()
    for spec, (first, *others) in groups.items():
        also = f" {1 + len(others)} tests need it." if others else ""
        first.add_marker(pytest.mark.skip(reason=why_missing(spec) + also))
        gone.update(others)
    deselect(config, items, gone)


@cache
def why_missing(spec):
    """Why the backend called `spec` cannot be used here; nothing if it can."""
    try:
        get_backend(spec)
    except ImportError as error:
        return str(error)
    return ""
