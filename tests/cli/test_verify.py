"""``kvcache verify`` from the command line."""

import json
import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")
pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")

from typer.testing import CliRunner

from kvcache.cli import app
from kvcache.verify.targets import reference

WIDE = {"COLUMNS": "200"}


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments], env=WIDE)


ARGUMENTS = ["--cache", "layers-window,pool-mixed", "--scenario", "ones,returns,evicted-device"]


def test_what_is_right(tmp_path):
    files = ["--json", str(tmp_path / "a.json"), "--junit", str(tmp_path / "a.xml")]
    result = run("reference", *ARGUMENTS, "--runs", "1", "--seed", "3", *files)
    assert result.exit_code == 0, result.output
    assert "kvcache layers, window, numpy:cpu" in result.output
    assert "the target lacks: tier device" in result.output
    assert "counts as noise" in result.output
    reports = json.loads((tmp_path / "a.json").read_text())
    assert [report["seed"] for report in reports] == [3, 3]
    assert all(report["passed"] for report in reports)
    suites = ET.parse(tmp_path / "a.xml").getroot()
    assert [suite.get("tests") for suite in suites] == ["3", "3"]


def test_what_is_wrong(monkeypatch):
    """A window that is one token too long."""
    monkeypatch.setitem(reference.POOLS, "window", lambda: reference.CausalCache(window=7))
    result = run("reference", "--cache", "pool-window", "--scenario", "ones,fives", "-x")
    assert result.exit_code == 1
    assert "DIFFERENT" in result.output
    assert "Begin(slot=0" in result.output
    assert "fives" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "reference, transformers, mlx-lm, or the URL of a server; got 'nothing'"),
        (["reference", "--cache", "x"], "--cache takes layers-full"),
        (["--scenario", "x"], "--scenario takes at-once"),
        (["--backend", "x"], "x"),
        (["--runs", "0"], "--runs"),
        (["--json", "no/such/folder/a.json"], "--json takes a file in a folder that exists"),
        (["http://127.0.0.1:1/v1"], "cold runs need a server that reuses nothing"),
        (["http://127.0.0.1:1/v1", "--cold", "[1]"], "--cold takes a JSON object"),
        (["http://127.0.0.1:1/v1", "--cold", "{"], "--cold takes a JSON object"),
    ],
)
def test_bad_options(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_server_that_is_not_there():
    result = run("http://127.0.0.1:1/v1", "--cold", '{"cache_prompt": false}')
    assert result.exit_code == 2
    assert "did not answer" in result.output


def test_the_help_teaches():
    result = run("--help")
    assert result.exit_code == 0
    for words in ("warm equals cold", "evicted-host", "Exit status", "--unchecked", "--cold"):
        assert words in result.output
