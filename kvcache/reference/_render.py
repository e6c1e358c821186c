"""Render one chat template: a program for a process of its own, which is given up if it runs wild.

A template is a program that came with a model file. The sandbox of Jinja keeps it from the
machine, but not from looping for ever or asking for any amount of memory; only the system can.

Input: JSON with the template, its variables, and limits. Output: JSON with the text, or an error.
Run by its path, so that it needs no import of kvcache. Not for import.
"""

import json
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment


def limit(seconds: int, nbytes: int) -> None:
    """Let the system end this process after so much work, where it can."""
    try:
        import resource
    except ImportError:  # not a POSIX system: the parent ends this process after a time
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))


def main() -> None:
    """Render the template of standard input to standard output."""
    job = json.load(sys.stdin)
    limit(job["seconds"], job["nbytes"])
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        text = environment.from_string(job["template"]).render(job["variables"])
        if len(text) <= job["characters"]:
            result = {"text": text}
        else:
            result = {"error": f"its text has {len(text)} characters"}
    except Exception as error:  # noqa: BLE001 - whatever a template brings about
        result = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
