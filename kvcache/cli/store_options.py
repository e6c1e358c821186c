"""Stores by URL, with options and secrets as the command line takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from kvcache.storage.reading import open_regular
from kvcache.stores import Seal, Store, open_store

StoreOptions: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="An option of the store, several if repeated: prefix=tenant-a: or connections=4 "
        "for servers, what fsspec takes for objects.",
    ),
]
"""The option ``--option`` of commands that take the URL of a store."""

_SECRET_NBYTES = 32
_MAX_NBYTES = 4 * _SECRET_NBYTES
"""Bytes of a file that are read: more are no secret."""


def open_with(url: str, options: Sequence[str] | None) -> Store:
    """Open the store of a URL.

    options: NAME=VALUE each, where a value that is JSON (4, true, null, "4") is what JSON says, and
        any other one a string. None for no options.

    Raises: typer.BadParameter for options that the store does not take; StoreError.
    """
    named = dict(_as_option(option) for option in options or ())
    try:
        return open_store(url, **named)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"--option: {error}") from error


def _as_option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise typer.BadParameter(f"--option takes NAME=VALUE; got {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def read_seal(path: Path) -> Seal:
    """Return the seal whose secret is in a file: 32 bytes, or 64 hexadecimal digits.

    Raises: typer.BadParameter for anything else; FileAccessError, StoreError.
    """
    with open_regular(path) as file:
        data = file.read(_MAX_NBYTES)
    if len(data) != _SECRET_NBYTES:
        try:
            data = bytes.fromhex(data.decode())
        except ValueError:
            data = b""
    if len(data) != _SECRET_NBYTES:
        raise typer.BadParameter(
            f"--secret takes a file of 32 bytes or 64 hexadecimal digits; {path} is none."
        )
    return Seal(data)
