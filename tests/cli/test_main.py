"""The command line as a whole: what it says where something is missing."""

import subprocess
import sys
from importlib.metadata import version

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from typer.testing import CliRunner

from kvcache.cli import app

RUN = "import sys; sys.argv[0] = 'kvcache'; from kvcache.cli import main; main()"


def without(package, *arguments):
    """Runs the command line in a process that lacks a package."""
    program = f"import sys; sys.modules[{package!r}] = None; {RUN}"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_it_says_how_to_install_it(package):
    result = without(package, "backends")
    assert result.returncode == 1
    assert result.stderr.startswith(f"The command line needs {package}")
    assert result.stderr.endswith(". Install it: pip install 'kvcache[cli]'\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("gguf", ["generate", "a"], "a model needs gguf. Install it: pip install 'kvcache[demo]'"),
        ("jinja2", ["chat"], "a model needs jinja2. Install it: pip install 'kvcache[demo]'"),
        *(
            (
                package,
                ["transcribe", "a.wav"],
                f"transcribing needs {package}. Install it: pip install 'kvcache[audio]'",
            )
            for package in ("soundfile", "soxr", "tokenizers")
        ),
    ],
)
def test_without_the_extra_of_a_command(package, arguments, message):
    pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
    if "transcribe" in arguments:  # the first package that is missing is named
        for other in ("soundfile", "soxr"):
            pytest.importorskip(other, reason="needs pip install 'kvcache[audio]'")
    result = without(package, *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert " ".join(result.stderr.split()) == f"Error: {message}"


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{version('kvcache')}\n")


def test_backends():
    result = CliRunner().invoke(app, ["backends"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "numpy" in result.stdout
    assert "KVCACHE_BACKEND overrides it." in result.stdout


def test_conformance():
    result = CliRunner().invoke(app, ["conformance", "--backend", "numpy"])
    assert result.exit_code == 0
    assert " passed, 0 failed, 0 skipped: dtype not in numpy" in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        "backends",
        "bench",
        "chat",
        "conformance",
        "generate",
        "inspect",
        "plan",
        "simulate",
        "transcribe",
        "verify",
    ],
)
def test_every_command_has_help(command):
    assert command in CliRunner().invoke(app, ["--help"]).stdout
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Usage: root {command} [OPTIONS]" in result.stdout
