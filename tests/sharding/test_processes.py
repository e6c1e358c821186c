"""Two processes that decode together, each with its part of the heads, agree with one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def run_both(script, place, **variables):
    """Runs both processes, which find each other at `place`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", HERE / script, str(rank), place],
            env=kept | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


@pytest.mark.one_backend(name="jax")
def test_jax():
    pytest.importorskip("jax", reason="needs pip install 'kvcache[jax]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_both(
        "two_jax_processes.py",
        f"127.0.0.1:{port}",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        JAX_PLATFORMS="cpu",
    )


@pytest.mark.one_backend(name="torch")
def test_torch(tmp_path):
    pytest.importorskip("torch", reason="needs pip install 'kvcache[torch]'")
    run_both("two_torch_processes.py", str(tmp_path / "meeting"))
