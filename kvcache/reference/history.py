"""Conversations in files, to go on with them after a restart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from kvcache.errors import ForeignFileError, NewerFileError
from kvcache.storage import schema
from kvcache.storage.reading import read_regular
from kvcache.storage.writing import replace_file

from .chat import Conversation
from .tokenizer import Tokenizer

__all__ = ["load_history", "save_history"]

FORMAT, VERSION = "kvcache conversation", 1
_NAMED = schema.record({"format": schema.one_of(FORMAT), "version": schema.integer(1, 2**31 - 1)})
_FIELDS = schema.record(
    {
        "model": schema.text,
        "messages": schema.list_of(schema.record({"role": schema.text, "content": schema.text})),
        "ids": schema.list_of(schema.integer(0, 2**31 - 1)),
        "rendered": schema.text,
    }
)


def save_history(path: str | os.PathLike[str], conversation: Conversation, model: str) -> None:
    """Write a conversation to `path` as JSON, whole or not at all. model: its fingerprint.

    Raises: FileAccessError, OSError. The file is as it was then.
    """
    fields = {"format": FORMAT, "version": VERSION, "model": model, **conversation.state}
    replace_file(path, [f"{json.dumps(fields)}\n".encode()])


def load_history(
    path: str | os.PathLike[str], tokenizer: Tokenizer, model: str
) -> Conversation | None:
    """Return the conversation in `path`, to go on with it; None if there is no such file.

    model: fingerprint of the one that goes on.

    Raises: FileAccessError, ForeignFileError, NewerFileError; ValueError for a conversation with
        another model, whose tokens have other ids.
    """
    if not Path(path).exists():
        return None
    fields = _read(path)
    if fields["model"] != model:
        raise ValueError(
            f"a conversation goes on with the model that it began with; {path} is of another one. "
            "Name that model, or another file."
        )
    return Conversation.resumed(tokenizer, fields["messages"], fields["ids"], fields["rendered"])


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the checked fields of a file. Raises: as :func:`load_history`."""
    try:
        contents = schema.parse_json(read_regular(path))
        _NAMED(contents, "the conversation")
        fields = cast("dict[str, Any]", contents)
        if fields["version"] <= VERSION:
            _FIELDS(contents, "the conversation")
    except schema.SchemaError as error:
        raise ForeignFileError(f"{path} is no conversation of kvcache chat: {error}.") from error
    if fields["version"] > VERSION:
        raise NewerFileError(
            f"this kvcache reads conversations up to version {VERSION}; {path} has "
            f"{fields['version']}. Upgrade kvcache."
        )
    return fields
