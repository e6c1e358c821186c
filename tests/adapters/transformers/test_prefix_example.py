"""The example of prefix reuse, on models as they are on disk."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

SCRIPT = Path(__file__).parents[3] / "examples" / "transformers_prefix.py"


@pytest.fixture
def ask(capsys):
    """Run the example; return how many tokens of each prompt it reused, and of how many."""
    spec = importlib.util.spec_from_file_location("transformers_prefix", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        script.main([*map(str, arguments)])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
        words = [line[1:].split() for line in lines]
        return [(int(matched), int(tokens)) for matched, _, tokens, *_ in words]

    return run


@pytest.mark.matrix
def test_the_reference_hybrid(ask, tmp_path):
    """A checkpoint of kvcache.reference.hybrid, as the Qwen3-Next that it is to transformers."""
    train = pytest.importorskip("kvcache.reference.hybrid.train")
    train.main([str(tmp_path), "--steps", "1"])
    first, second, third, branch = ask(tmp_path, "--tokens", 9)
    assert first[0] == 0
    assert 0 < first[1] <= second[0] < second[1] <= third[0] < third[1]
    assert first[1] <= branch[0] < branch[1]


@pytest.mark.matrix
@pytest.mark.model
def test_smollm2(ask):
    pytest.importorskip("accelerate", reason="accelerate is not installed; it reads GGUF files")
    gguf = pytest.importorskip("kvcache.reference.llama.gguf", reason="needs gguf")
    path = gguf.default_model_path()
    first, second, third, branch = ask(path.parent, "--gguf", path.name)
    assert first == (0, 37)
    assert second[0] >= 43
    assert third[0] >= 66
    assert branch[0] >= 49
