"""Every backend of kvcache passes the suite that comes with it; what it lacks is declared."""

from typing import ClassVar

import pytest

from kvcache import DTypeError, get_backend
from kvcache.backends import HOST_DTYPES
from kvcache.backends._numpy import NumpyBackend
from kvcache.testing import BackendSuite, run_suite
from kvcache.testing.checks import all_checks


class TestNumpy(BackendSuite):
    backend = "numpy"


class TestTorch(BackendSuite):
    backend = "torch"


class TestTorchCuda(BackendSuite):
    backend = "torch:cuda"


class TestJax(BackendSuite):
    backend = "jax"


class TestJaxGpu(BackendSuite):
    backend = "jax:gpu"


class TestMlx(BackendSuite):
    backend = "mlx"


class TestArrayApi(BackendSuite):
    backend = "array_api:array_api_strict"


class TestArrayApiOverNumpy(BackendSuite):
    """NumPy's dtypes are types, not the dtypes of its arrays: CuPy has the same form."""

    backend = "array_api:numpy"


class Mine(NumpyBackend):
    """A third party's backend: all it takes to have it checked is the class below."""


class TestMine(BackendSuite):
    backend = Mine()


class WithAGap(NumpyBackend):
    """Its framework cannot exchange bytes."""

    def from_dlpack(self, array):
        if array.dtype == "uint8":
            raise BufferError("no uint8 through DLPack")
        return super().from_dlpack(array)


class TestKnownGap(BackendSuite):
    """What is known to fail is expected to: one dtype of a check, or all of them."""

    backend = WithAGap()
    known_gaps: ClassVar[dict[str, str]] = {
        "dlpack_from_itself-uint8": "no uint8 through DLPack",
        "dlpack_from_numpy-uint8": "no uint8 through DLPack",
        "recurrent_cache_resumes_at_resume_points-uint8": "no uint8 through DLPack",
    }


def test_a_gap_that_has_closed_is_reported():
    class Closed(BackendSuite):
        backend = NumpyBackend()
        known_gaps: ClassVar[dict[str, str]] = {"host_round_trip": "it used to fail"}

    check = next(check for check in all_checks() if check.name == "host_round_trip")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        Closed().test_contract(check)


# What mixes up recurrent states is found, whoever does it.


class ReadsTheNextRow(NumpyBackend):
    def read_rows(self, buffer, index, axis):
        return super().read_rows(buffer, (index + 1) % buffer.shape[axis], axis)


class WritesInReverse(NumpyBackend):
    def write_row_sets(self, buffers, rows, index, axis):
        return super().write_row_sets(buffers, rows, index[::-1], axis)


POOL, LAYER = "recurrent_pool_keeps_states_apart", "recurrent_cache_keeps_states_apart"


def check_called(name):
    """A check in float32, which NumPy passes."""
    check = next(check for check in all_checks() if str(check) == f"{name}-float32")
    check.run(NumpyBackend(), "float32")
    return check


@pytest.mark.parametrize("backend", [ReadsTheNextRow(), WritesInReverse()])
def test_a_backend_that_mixes_up_rows_is_found(backend):
    with pytest.raises(AssertionError):
        check_called(POOL).run(backend, "float32")


@pytest.mark.parametrize(
    ("name", "where", "broken"),
    [
        # A slot is used again while a sequence has its state.
        (POOL, "kvcache.pool.state_room._held", lambda sequences: set()),
        # A sequence that goes back stays where it is.
        (POOL, "kvcache.pool.recurrent.RecurrentCache._cut", lambda *args: lambda: None),
        # Kept states change places.
        (
            LAYER,
            "kvcache.layers.recurrent_copies.CopyableStates._to_keep",
            lambda self, stop: dict(zip(self._kept, reversed(self._kept.values()), strict=True)),
        ),
    ],
)
def test_a_cache_that_mixes_up_states_is_found(monkeypatch, name, where, broken):
    check = check_called(name)
    monkeypatch.setattr(where, broken)
    with pytest.raises((AssertionError, ValueError)):
        check.run(NumpyBackend(), "float32")


# What each framework has, as the documentation says.

LACKS = {
    "numpy": set(),
    "torch": set(),
    "jax": set(),
    "mlx": {"float8_e4m3fn", "float8_e5m2"},
    "array_api": {"float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"},
}


def test_dtype_matrix(backend):
    assert list(backend.dtypes) == [name for name in HOST_DTYPES if name in backend.dtypes]
    assert set(HOST_DTYPES) - set(backend.dtypes) == LACKS[backend.name]
    for name in backend.dtypes:
        assert backend.dtype_name(backend.alloc((2, 1), name)) == name
    for name in ("float64", "complex64", "uint16", "nonsense"):
        with pytest.raises(DTypeError, match=f"{backend.name} has no dtype '{name}'; it has"):
            backend.dtype(name)


def test_every_check_says_what_it_checks():
    for check in all_checks():
        assert (check.run.__doc__ or "").strip(), check.name


def test_the_report_counts_every_check():
    results = list(run_suite(get_backend("numpy")))
    assert [result.check for result in results] == list(all_checks())
    assert {result.outcome for result in results} == {"passed"}


def test_the_report_tells_missing_from_failed():
    few = ("float32", "int32", "bool")

    class FewTypes(NumpyBackend):
        def _framework_dtypes(self):
            return {name: HOST_DTYPES[name] for name in few}

    results = list(run_suite(FewTypes()))
    for result in results:
        expected = "passed" if result.check.dtype in few else "missing"
        assert result.outcome == expected, result
        assert bool(result.reason) == (expected == "missing")


def test_devices_and_spec(backend):
    assert get_backend(backend.spec).device == backend.device
    assert type(get_backend(backend.spec)) is type(backend)
    if backend.name != "array_api":
        assert backend.device in backend.devices()
