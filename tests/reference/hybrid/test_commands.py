"""`kvcache chat` and `kvcache generate` with a checkpoint directory."""

import pytest

pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from typer.testing import CliRunner

from kvcache.cli import app
from kvcache.reference.errors import ModelFileError, UnsupportedModelError

# Of 8 tokens to compute each: where every length is compiled by itself, there is one.
TURNS = "Hello\nAnd\nSo?\n"


def run(command, path, *arguments, **options):
    arguments = [command, "--model", str(path), *arguments]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"}, **options)


def chatted(path, backend, cache):
    """The answers of `kvcache chat`, and the tokens reused in each turn."""
    options = ["--backend", backend, "--cache", cache, "-n", "5", "--no-compare"]
    result = run("chat", path, *options, input=TURNS)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "tokens reused, first token" in line]
    return result.stdout, [line.partition(" tokens")[0] for line in lines]


@pytest.fixture(scope="session")
def expected(chat_path):
    return chatted(chat_path, "numpy", "kv")


def test_chat_reuses_earlier_turns(expected):
    text, reused = expected
    assert len(text.encode()) > 15
    # "Hello" between the tokens of its turn and of the answer, of which the last was not fed.
    assert reused == ["0 of 8", "12 of 20", "24 of 32"]


@pytest.mark.parametrize("cache", ["kv", "pool"])
def test_chat_says_the_same_on_every_backend(backend, chat_path, expected, cache):
    assert chatted(chat_path, backend.name, cache) == expected


def test_chat_with_a_ring(chat_path):
    assert chatted(chat_path, "numpy", "rotating")[1] == ["0 of 8", "12 of 20", "24 of 32"]


@pytest.mark.parametrize("cache", ["kv", "rotating", "none", "pool"])
def test_generate(chat_path, cache):
    result = run("generate", chat_path, "--cache", cache, "-n", "6", "Once")
    assert result.exit_code == 0, result.output
    [text] = {result.stdout.removeprefix("[1] ")}
    kv = run("generate", chat_path, "-n", "6", "Once")
    assert text == kv.stdout
    assert "kv, float32" in kv.stderr
    assert "for 9 tokens, 0 growths" in kv.stderr


def test_generate_many(chat_path):
    result = run("generate", chat_path, "-n", "6", "Once", "-p", "Twice", "--max-sequences", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("[1] ")
    assert "Prompt 2 waits" in result.stderr
    assert "tokens/s" in result.stderr


def test_generate_with_the_template(chat_path):
    result = run("generate", chat_path, "-n", "6", "--chat", "Hello")
    assert result.exit_code == 0, result.output
    assert "8 tokens" in result.stderr


@pytest.mark.cross_backend
def test_relay(chat_path):
    relayed = run("generate", chat_path, "-n", "6", "--relay", "numpy,torch", "Once")
    assert relayed.exit_code == 0, relayed.output
    assert relayed.stdout == run("generate", chat_path, "-n", "6", "Once").stdout
    assert "[4 caches of 7 tokens handed to torch" in relayed.stderr


def test_what_cannot_be(chat_path, tmp_path):
    result = run("generate", chat_path, "--cache", "pool", "--context-shift", "Once")
    assert isinstance(result.exception, UnsupportedModelError)
    assert "a state cannot forget them" in str(result.exception)
    result = run("chat", tmp_path)
    assert isinstance(result.exception, ModelFileError)
    assert "config.json" in str(result.exception)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = run("chat", tmp_path)
    assert "whose model_type is 'qwen3_next'; got 'llama'" in str(result.exception)
