"""`kvcache transcribe`: its help, and the errors that a person meets first."""

import sys

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")
pytest.importorskip("soundfile", reason="needs pip install 'kvcache[audio]'")

from kvcache.cli import main


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line; returns the exit status, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kvcache", "transcribe", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_status:
            main()
        out = capsys.readouterr()
        return exit_status.value.code, out.out, " ".join(out.err.split())

    return run


def test_help(command):
    status, out, _ = command("--help")
    assert status == 0
    assert "kvcache transcribe --backend jax a.wav b.wav" in out


def test_a_missing_recording(command, tmp_path):
    status, out, notes = command(tmp_path / "a.wav")
    assert (status, out) == (1, "")
    assert notes.startswith("Error: a recording must be a sound file")
