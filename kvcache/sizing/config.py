"""Configs of models as Hugging Face writes them, read as JSON: no library of models is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from kvcache.errors import ForeignFileError
from kvcache.storage import schema
from kvcache.storage.reading import read_regular

_LARGEST = 1 << 40
"""No size in a config is as large; sums and products of such sizes stay cheap."""
_TEXT_PARTS = ("text_config", "thinker_config", "llm_config", "language_config")
"""Names under which configs of models with several parts have that of the decoder."""


class Config:
    """The decoder's part of a config, whose values are checked when they are asked for."""

    def __init__(self, values: Mapping[str, object], name: str) -> None:
        self._values, self.name = values, name

    def __contains__(self, field: str) -> bool:
        return self._values.get(field) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    @property
    def family(self) -> str:
        """The `model_type`."""
        family = self._values.get("model_type")
        if not isinstance(family, str):
            raise ForeignFileError(f"a config has a model_type; {self.name} has {family!r}.")
        return family

    def size(self, *fields: str, default: int | None = None) -> int:
        """Return the first of the fields that is there, an integer >= 0.

        Raises: ForeignFileError for none of them without a default, or for another value.
        """
        for field in fields:
            value = self._values.get(field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LARGEST:
                raise ForeignFileError(
                    f"{field} is an integer from 0 to {_LARGEST - 1}; "
                    f"{self.name} has {value!r:.80}."
                )
            return value
        if default is None:
            raise ForeignFileError(
                f"a config of {self.family} has {' or '.join(fields)}; {self.name} has not."
            )
        return default

    def names(self, field: str) -> list[str]:
        """Return a list of strings.

        Raises: ForeignFileError for anything else.
        """
        value = self._values.get(field)
        if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
            raise ForeignFileError(f"{field} is a list of names; {self.name} has {value!r:.80}.")
        return value

    def numbers(self, field: str) -> list[int]:
        """Return a list of numbers of layers.

        Raises: ForeignFileError for anything else.
        """
        value = self._values.get(field)
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            raise ForeignFileError(
                f"{field} is a list of numbers of layers; {self.name} has {value!r:.80}."
            )
        return value

    def text(self, field: str) -> str:
        """Return a string.

        Raises: ForeignFileError for anything else.
        """
        value = self._values.get(field)
        if not isinstance(value, str):
            raise ForeignFileError(f"{field} is a string; {self.name} has {value!r:.80}.")
        return value

    def flag(self, field: str, *, default: bool = False) -> bool:
        """Return whether a field is true."""
        value = self._values.get(field)
        return default if value is None else bool(value)

    def part(self, field: str) -> Config:
        """Return an object within this one.

        Raises: ForeignFileError for anything else.
        """
        value = self._values.get(field)
        if not isinstance(value, dict):
            raise ForeignFileError(f"{field} is an object; {self.name} has {value!r:.80}.")
        return Config({"model_type": self.family, **value}, self.name)


ConfigPath: TypeAlias = str | os.PathLike[str]


def read_config(path: ConfigPath) -> Config:
    """Read the ``config.json`` of a model, of the decoder where it has several parts.

    Raises: FileAccessError for a file that cannot be read, ForeignFileError for something else.
    """
    try:
        values = schema.parse_json(read_regular(path))
    except schema.SchemaError as error:
        raise ForeignFileError(f"a config is JSON; {os.fspath(path)} is not: {error}.") from error
    while isinstance(values, dict):
        inner = next((values[name] for name in _TEXT_PARTS if values.get(name)), None)
        if not isinstance(inner, dict):
            return Config(values, os.fspath(path))
        values = {"model_type": values.get("model_type"), **inner}
    raise ForeignFileError(f"a config is a JSON object; {os.fspath(path)} is none.")
