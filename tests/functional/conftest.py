"""Each framework's way to turn a function into a program."""

import importlib
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Marks programs of torch as slow: it takes seconds to compile one, others take a moment."""
    for item in items:
        if item.path.parent == HERE and "program" in item.fixturenames:
            mark = item.get_closest_marker("one_backend")
            if mark and mark.kwargs["name"] == "torch":
                item.add_marker("slow")


def _eagerly(function):
    return function


def _jax(function):
    return importlib.import_module("jax").jit(function, donate_argnums=0)


def _torch(function):
    torch = importlib.import_module("torch")
    torch.compiler.reset()  # one count of compilations per test
    return torch.compile(function, fullgraph=True)


def _mlx(function):
    return importlib.import_module("mlx.core").compile(function)


COMPILERS = {"jax": _jax, "torch": _torch, "mlx": _mlx}


@pytest.fixture
def program(backend):
    """Compiles a function whose first argument is a state, where the framework has a compiler."""
    return COMPILERS.get(backend.name, _eagerly)
