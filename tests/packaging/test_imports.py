"""Who may import whom: the contracts in pyproject.toml, and what importing kvcache costs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"cupy", "jax", "mlx", "tensorflow", "torch"}


def lint_imports(folder):
    """Runs import-linter over the package in `folder`: it looks in its working directory first."""
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    program = (
        "import sys; from importlinter.cli import lint_imports_command as run; run(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "--no-cache", "--config", ROOT / "pyproject.toml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_run_one_way(installed):
    result = lint_imports(installed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("backends/base.py", "import kvcache.layers", "imports run one way"),
        ("errors.py", "from kvcache import KVCache", "imports run one way"),
        ("newcomer.py", "", "imports run one way"),
        ("backends/_numpy.py", "from . import _torch", "one another only through base"),
        ("reference/__init__.py", "import kvcache.testing", "imports the conformance suite"),
        ("bench/harness/tables.py", "from kvcache.bench import append", "benchmarks know their"),
        ("sizing/shape.py", "import kvcache.prefix", "imports run one way"),
        ("bench/step/run.py", "import kvcache.bench.plan.run", "benchmarks know their harness"),
        ("verify/cold.py", "import kvcache.verify.run", "targets know the bench"),
        ("layers/growing.py", "def late():\n    import torch.nn", "frameworks are imported by"),
    ],
)
def test_a_wrong_import_breaks_a_contract(installed, tmp_path, module, line, broken):
    shutil.copytree(installed / "kvcache", tmp_path / "kvcache")
    with (tmp_path / "kvcache" / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(rf"{broken}.* BROKEN", result.stdout)


def imported_with(statement):
    """Returns the top-level modules that a fresh interpreter holds after `statement`."""
    program = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-P", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.installation
@pytest.mark.parametrize(
    "statement",
    [
        "import kvcache",
        "import kvcache.testing",
        "import kvcache; kvcache.get_backend('numpy')",
        "import kvcache, numpy; kvcache.backend_of(numpy.zeros(1))",
    ],
)
def test_importing_kvcache_imports_no_framework_but_numpy(statement):
    assert imported_with(statement) & (FRAMEWORKS | {"numpy"}) == {"numpy"}


def test_the_probe_sees_a_framework_that_is_imported():
    assert "numpy" not in imported_with("import json")
    assert "torch" in imported_with("sys.modules['torch'] = sys")
