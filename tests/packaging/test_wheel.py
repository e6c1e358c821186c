"""What a user installs: every module of the checkout, typed, licensed, and nothing else."""

import importlib.metadata
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_wheel_holds_every_module_where_it_is_imported_from(installed):
    expected = {f"kvcache/{name}" for name in modules(ROOT / "kvcache")}
    expected |= {f"kvcache/backends/{name}" for name in modules(ROOT / "backends")}
    assert modules(installed) == expected
    assert {"kvcache/backends/base.py", "kvcache/testing/__init__.py"} <= expected


def test_wheel_is_marked_as_typed(installed):
    assert (installed / "kvcache" / "py.typed").is_file()


def test_wheel_has_one_top_level_package(installed):
    folders = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert folders == {"kvcache"}


@pytest.fixture
def metadata(installed):
    (path,) = installed.glob("*.dist-info")
    return path


def test_metadata(metadata):
    fields = message_from_string((metadata / "METADATA").read_text())
    assert fields["Version"] == importlib.metadata.version("kvcache")
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    assert set(fields.get_all("Provides-Extra")) >= {"torch", "jax", "mlx", "cli", "demo", "all"}
    assert (metadata / "licenses" / "LICENSE").is_file()


def test_core_dependencies_are_few_and_no_framework(metadata):
    fields = message_from_string((metadata / "METADATA").read_text())
    core = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    names = sorted(line.split(">")[0] for line in core)
    assert names == ["array-api-compat", "ml-dtypes", "numpy", "safetensors", "xxhash"]


def test_command_line_is_installed_and_no_backend_is_an_entry_point(metadata):
    assert (metadata / "entry_points.txt").read_text().split("\n") == [
        "[console_scripts]",
        "kvcache = kvcache.cli:main",
        "",
    ]
