"""A Redis or Valkey server of its own for a benchmark, on a free port of loopback."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcache.bench.harness.contest import UnavailableError

_ATTEMPTS = 5
_START_SECONDS = 10.0
_HOST = "127.0.0.1"


@contextmanager
def running_server(program: str, directory: Path, budget: int = 0) -> Iterator[str]:
    """Start a server without a disk; give its URL. It ends with the block.

    budget: bytes of its memory, beyond which it evicts what was used least recently; 0 for no
    limit.

    Raises: UnavailableError if there is no such program, or it does not start.
    """
    path = shutil.which(program)
    if path is None:
        raise UnavailableError(f"there is no {program} here")
    process, port = _started(path, directory, budget)
    try:
        yield f"redis://{_HOST}:{port}"
    finally:
        process.kill()
        process.wait()


def _started(program: str, directory: Path, budget: int) -> tuple[subprocess.Popen[bytes], int]:
    """Return a server that answers, and its port."""
    # Another process may take the port between the two lines.
    for _ in range(_ATTEMPTS):
        port = _free_port()
        options = {"port": str(port), "bind": _HOST, "save": "", "appendonly": "no"}
        options |= {"maxmemory": str(budget), "maxmemory-policy": "allkeys-lru"}
        command = [program, "--dir", str(directory)]
        command += [word for name, value in options.items() for word in (f"--{name}", value)]
        process = subprocess.Popen(  # noqa: S603 - a program that the user has installed
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            if _answers(process, port):
                return process, port
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.kill()
        process.wait()
    raise UnavailableError(f"{program} does not start")


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server answers; return False if it has ended, or does not in time."""
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with socket.create_connection((_HOST, port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(5) == b"+PONG":
                    return process.poll() is None
        except OSError:
            time.sleep(0.01)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
