"""`kvcache generate`: options that would be ignored are refused before a model is loaded."""

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from typer.testing import CliRunner

import kvcache
from kvcache.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *arguments], env={"COLUMNS": "300"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a prompt is needed"),
        (["a", "-p", "b", "--cache", "rotating"], "several prompts share a pool; got --cache rot"),
        (["-p", "a", "-p", "b", "--prefill-chunk", "3"], "got --cache kv --prefill-chunk"),
        (["a", "--window", "5"], "--context-shift are those of a pool. Add --cache pool"),
        (["a", "--context-shift"], "Add --cache pool"),
    ],
)
def test_refused(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--relay", "numpy"], "two backends or more, with commas between them; got 'numpy'"),
        (["--relay", "numpy,"], "got 'numpy,'. For example --relay numpy,torch,jax,mlx"),
        (["--relay", "numpy,torch", "-b", "numpy"], "the first one too. Drop --backend"),
        (["--relay", "numpy,torch", "-p", "b"], "got --cache kv with several prompts"),
        (["--relay", "numpy,torch", "--cache", "pool"], "got --cache pool. Give one prompt"),
        (["--relay", "numpy,torch", "--cache", "none"], "got --cache none. Give one prompt"),
        (["--relay", "numpy,torch", "--relay-every", "0"], "'--relay-every'"),
        (["--relay-every", "4"], "--relay-every is that of a relay. Add --relay numpy,torch"),
    ],
)
def test_relays_refused(arguments, message):
    result = run("a", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("relay", ["numpy,pen", "pen,numpy"])
def test_an_unknown_backend(relay):
    assert isinstance(run("a", "--relay", relay).exception, kvcache.UnknownBackendError)


@pytest.mark.model
def test_several_prompts_wait_and_go_on(default_model):
    """On NumPy: the other backends are the business of the tests of the server."""
    prompts = ["The capital of France is", "-p", "Once upon a time", "-p", "The three laws"]
    options = ["--cells", "36", "--max-sequences", "2", "-n", "8"]
    result = CliRunner().invoke(app, ["generate", *prompts, *options])
    assert result.exit_code == 0
    assert "[1]  Paris." in result.stdout
    assert "[2] , the city of" in result.stdout
    assert "[3] " in result.stdout
    assert "Prompt 3 waits: all of 2 sequences are in use." in result.stderr
    assert "1 max tokens, 2 max tokens, 3 max tokens" in result.stderr
