"""The project's own sdist and wheel, built offline from a copy of the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("LICENSE", "README.md", "backends", "kvcache", "pyproject.toml")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, made from the sdist: what either one forgets is missing here."""
    pytest.importorskip("build", reason="build is not installed")
    pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 is not installed")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    built = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (checkout / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A folder that holds what installing the wheel would put on the path."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder
