"""Scripts of this folder, run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def started(script, *arguments):
    """Start a script, and return its process; it finds the modules beside it.

    Python is told where, because it may have been told to import nothing from there by itself.
    """
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, HERE / script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script, *arguments):
    """Run a script to its end; return what it prints."""
    process = started(script, *arguments)
    try:
        return "".join(process.communicate(timeout=300))
    finally:
        process.kill()
