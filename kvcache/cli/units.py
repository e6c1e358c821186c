"""Bytes and ages as people write them, read and written."""

from __future__ import annotations

import re

import typer

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_NAMES = ("B", "KiB", "MiB", "GiB", "TiB")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def as_bytes(option: str, text: str) -> int:
    """Return a number of bytes; `text` may end in k, m, g or t, the powers of 1,024.

    Raises: typer.BadParameter, which names the option.
    """
    # 15 digits: more are no size of anything.
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{0,15})?) ?([kmgt]?)(?:i?b)?", text.lower(), re.ASCII)
    if match is None:
        raise typer.BadParameter(f"{option} takes bytes like 500M, 64G or 1.5T; got {text!r}.")
    return round(float(match[1]) * (1 << 10 * _POWERS[match[2]]))


def in_bytes(nbytes: int) -> str:
    """Write a number of bytes in nine characters at most."""
    value, power = float(nbytes), 0
    while value >= 1024 and power < len(_NAMES) - 1:
        value, power = value / 1024, power + 1
    return f"{nbytes} B" if not power else f"{value:,.{1 if value < 1000 else 0}f} {_NAMES[power]}"


def as_seconds(option: str, text: str) -> float:
    """Return a time in seconds; `text` ends in s, m, h, d or w.

    Raises: typer.BadParameter, which names the option.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{0,9})?) ?([smhdw])", text.lower(), re.ASCII)
    if match is None:
        raise typer.BadParameter(f"{option} takes a time like 90m, 12h, 7d or 2w; got {text!r}.")
    return float(match[1]) * _SECONDS[match[2]]


def in_time(seconds: float) -> str:
    """Write an age in its largest unit: 45s, 12m, 5h, 8d."""
    seconds = max(0.0, seconds)
    for unit in ("d", "h", "m"):
        if seconds >= 2 * _SECONDS[unit]:
            return f"{seconds / _SECONDS[unit]:,.0f}{unit}"
    return f"{seconds:.0f}s"
