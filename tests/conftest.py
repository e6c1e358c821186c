"""What every test shares: one backend for each framework that is installed, and Hypothesis.

A framework or device that is missing shows as one skipped test that says why, and how many more
need it. ``HYPOTHESIS_PROFILE=thorough`` looks for counterexamples at random and long; by default
it is the same few every time.
"""

import os
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, settings

from kvcache import Backend, get_backend

BACKENDS = ("numpy", "torch", "jax", "mlx", "array_api:array_api_strict", "torch:cuda", "jax:gpu")

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=SLOW)
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
def _no_backend_from_the_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVCACHE_BACKEND", raising=False)
        yield


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn."""
    return get_backend(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of all tests on a backend that this machine lacks, leaves one, which is skipped."""
    groups: dict[str | None, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(needed_backend(item), []).append(item)
    for spec, group in groups.items():
        reason = why_missing(spec) if spec else ""
        if reason:
            also = f" {len(group)} tests need it." if len(group) > 1 else ""
            group[0].add_marker(pytest.mark.skip(reason=reason + also))
            config.hook.pytest_deselected(items=group[1:])
            gone = set(group[1:])
            items[:] = [item for item in items if item not in gone]


def needed_backend(item: pytest.Item) -> str | None:
    """The backend a test runs on: that of the fixture, or the attribute of its class."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    spec = parameters.get("backend", getattr(getattr(item, "cls", None), "backend", None))
    return spec if spec in BACKENDS else None


@cache
def why_missing(spec: str) -> str:
    """Why the backend called `spec` cannot be used here; nothing if it can."""
    try:
        get_backend(spec)
    except ImportError as error:
        return str(error)
    return ""
