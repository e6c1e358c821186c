"""`kvcache chat`, with a real model."""

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from typer.testing import CliRunner

from kvcache.cli import app


@pytest.mark.model
def test_on_the_command_line(default_model, tmp_path):
    drawn = tmp_path / "tree.svg"
    options = ["chat", "-n", "4", "--cache", "pool", "--explain", "--tree", str(drawn)]
    result = CliRunner().invoke(app, options, input="Hello\n\nWho are you?\n/quit\nno more\n")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip().splitlines()) == 2
    assert result.stderr.count("tokens reused, first token after") == 2
    assert "without reuse" in result.stderr
    assert result.stderr.count("\nnot reused: ") == 2
    assert " new\n" in result.stderr
    assert "no more" not in result.stderr
    assert drawn.read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "best"], "there is no policy 'best'"),
        (["--tree", "missing/tree.svg"], "--tree takes a file in a folder that exists"),
        (["--tree", "."], "--tree takes a file in a folder that exists"),
        (["--budget", "-1"], "--budget"),
        (["--option", "budget=9"], "--option needs --store beside it"),
        (["--store", "memory:", "--option", "budget"], "--option takes NAME=VALUE; got 'budget'"),
        (["--store", "memory:", "--option", "colour=red"], "keyword argument 'colour'"),
        (["--store", "memory:", "--option", "budget=-9"], "got -9"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(
    options, message, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvcache.cli.chat.load_model", lambda *_: pytest.fail("it was loaded"))
    result = CliRunner().invoke(app, ["chat", *options])
    assert result.exit_code != 0
    assert message in " ".join(f"{result.output} {result.exception}".replace("│", " ").split())


def test_input_that_is_no_text():
    from kvcache.cli import chat

    with CliRunner().isolation(b"Hello\n\xff\xfe\n"):
        lines = chat._lines()
        with pytest.raises(ValueError, match=r"turns are lines of utf-8 text; .*0xff"):
            list(lines)
