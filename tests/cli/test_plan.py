"""``kvcache plan``: tables and files of sizes, computed from configs alone."""

import json

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from typer.testing import CliRunner

import kvcache
from kvcache.cli import app
from tests.sizing.models import written


def invoke(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "80"})


def rows_of(result):
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_bytes_per_token_and_per_state(tmp_path):
    configs = [written(tmp_path, name) for name in ("Qwen3-Next-80B-A3B", "gpt-oss-20b")]
    rows = rows_of(invoke(*configs))
    assert "Qwen3-Next-80B-A3B 12 0 36 24.0 KiB 73.7 MiB 3,144" in rows
    assert "gpt-oss-20b 12 12 0 24.0 KiB 3.0 MiB" in rows


def test_lengths_and_how_many_fit(tmp_path):
    config = written(tmp_path, "Llama-3.1-8B")
    rows = rows_of(invoke(config, "--tokens", "8192, 1024", "--budget", "10G"))
    at = next(i for i, row in enumerate(rows) if row.endswith("fit into 10.0 GiB"))
    assert rows[at + 1] == "1,024 8,192"
    assert rows[at + 3 : at + 5] == ["Llama-3.1-8B 128.0 MiB 1.0 GiB", "80 10"]


def test_a_folder_and_another_dtype(tmp_path):
    folder = tmp_path / "my [model]"
    folder.mkdir()
    written(folder, "Llama-3.1-8B").rename(folder / "config.json")
    rows = rows_of(invoke(folder, "--dtype", "float32"))
    assert "my [model] 32 0 0 256.0 KiB" in rows


def test_a_file_holds_everything(tmp_path):
    config, path = written(tmp_path, "Falcon-H1-7B"), tmp_path / "plan.out"
    rows_of(invoke(config, "--tokens", "10", "--json", path))
    document = json.loads(path.read_text())
    assert document["format"] == "kvcache.plan/1"
    [model] = document["models"]
    state = 44 * (3584 * 3 * 2 + 24 * 128 * 256 * 4)
    assert model["bytes_per_token"] == 44 * 1024
    assert model["bytes_per_state"] == state
    assert model["tokens_per_state"] == pytest.approx(state / (44 * 1024))
    assert model["bytes_of_sequences"] == {"10": 440 * 1024 + state}
    assert (model["family"], model["layers"], model["window_tokens"]) == ("falcon_h1", 44, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "many"], "--tokens takes numbers like 1024,8192; got 'many'."),
        (["--tokens", ""], "--tokens takes numbers"),
        (["--budget", "much"], "--budget takes bytes like 500M, 64G or 1.5T; got 'much'."),
        (["--json", "/nowhere/it.json"], "--json takes a file in a folder that exists"),
    ],
)
def test_wrong_options_are_refused(tmp_path, arguments, message):
    result = invoke(written(tmp_path, "Qwen3-8B"), *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_what_is_no_config_is_an_error_of_kvcache(tmp_path):
    (tmp_path / "it.json").write_text("[]")
    assert isinstance(invoke(tmp_path / "it.json").exception, kvcache.ForeignFileError)
    assert isinstance(invoke(tmp_path / "none.json").exception, FileNotFoundError)


def test_help_teaches_by_an_example():
    result = invoke("--help")
    assert "kvcache plan Qwen3-Next/config.json --tokens 8192,131072" in " ".join(
        result.stdout.replace("│", " ").split()
    )
