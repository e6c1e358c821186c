"""The real model that some commands are tested with."""

import pytest

from kvcache.reference.errors import ModelFileError


@pytest.fixture(scope="session")
def default_model():
    """Skips what needs SmolLM2-135M-Instruct where it is not installed."""
    pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
    pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")
    from kvcache.reference.llama.gguf import default_model_path

    try:
        return default_model_path()
    except ModelFileError as error:
        pytest.skip(str(error))
