"""Chat templates: rendered in a sandbox, in a process of its own with bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from kvcache.reference.errors import UnsupportedModelError

SECONDS = 5
"""Of computing that a template may take; usual ones take some milliseconds."""
NBYTES = 1 << 29
"""Bytes of memory that its process may have, where the system keeps to that."""
CHARACTERS = 1 << 22
"""Characters of a text, beside those of its messages."""
_PATIENCE = 12
"""Times the seconds of computing that may pass, on a busy machine, or one that counts none."""
_PROGRAM = Path(__file__).with_name("_render.py")


class _Result(TypedDict, total=False):
    """Output of the program: one of both."""

    text: str
    error: str


def render_template(template: str, variables: Mapping[str, object]) -> str:
    """Return the text of a chat template, a program of unknown origin.

    variables: JSON values by name.

    Raises: UnsupportedModelError if the template fails, or takes more time or memory, or makes
        more text, than a chat could need.
    """
    given = json.dumps(variables)
    job = {
        "template": template,
        "variables": variables,
        "seconds": SECONDS,
        "nbytes": NBYTES + 16 * len(given),
        "characters": CHARACTERS + len(given),
    }
    # -P: this folder has modules with names of others.
    command = [sys.executable, "-P", str(_PROGRAM)]
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            command,
            input=json.dumps(job),
            capture_output=True,
            encoding="utf-8",
            timeout=_PATIENCE * SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _failed("it does not come to an end") from None
    result = _parsed(done.stdout)
    if "text" not in result:
        reason = f"it takes more than {SECONDS} s, or too much memory"
        raise _failed(result.get("error", reason))
    return result["text"]


def _parsed(output: str) -> _Result:
    """Return the result in the output of a process that may have been ended at any time."""
    try:
        result: _Result = json.loads(output)
    except ValueError:
        return {}
    return result


def _failed(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a chat template must be plain Jinja; this one fails: {reason}. "
        "Use plain completion, or another model."
    )
