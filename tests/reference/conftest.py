"""The backends that the reference models are tested on."""

import pytest

import kvcache
from kvcache.errors import BackendNotAvailableError


@pytest.fixture(scope="session", params=["jax", "mlx", "numpy", "torch"])
def backend(request):
    """Every backend that is installed."""
    try:
        return kvcache.get_backend(request.param)
    except BackendNotAvailableError as error:
        pytest.skip(str(error))
