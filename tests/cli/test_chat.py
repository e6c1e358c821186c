"""`kvcache chat`, with a real model."""

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from typer.testing import CliRunner

from kvcache.cli import app


@pytest.mark.model
def test_on_the_command_line(default_model, tmp_path):
    drawn = tmp_path / "tree.svg"
    options = ["chat", "-n", "4", "--cache", "pool", "--tree", str(drawn)]
    result = CliRunner().invoke(app, options, input="Hello\n\nWho are you?\n/quit\nno more\n")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip().splitlines()) == 2
    assert result.stderr.count("tokens reused, first token after") == 2
    assert "without reuse" in result.stderr
    assert "no more" not in result.stderr
    assert drawn.read_text(encoding="utf-8").startswith("<svg")
