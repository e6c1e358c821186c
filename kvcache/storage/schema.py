"""Checks of JSON from a file, said once and made before anything is built of it."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

Check: TypeAlias = Callable[[object, str], None]
"""Raise SchemaError unless a value, called by a name, is as it must be."""


class SchemaError(ValueError):
    """A value in a file is not as it must be; the text names it."""


def parse_json(text: str | bytes) -> object:
    """Return JSON of unknown origin as a value.

    Raises: SchemaError if it is none, or nested too deep.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(str(error)) from error


def text(value: object, name: str) -> None:
    """Check that a value is a string."""
    _require(isinstance(value, str), name, "a string", value)


def integer(low: int, high: int) -> Check:
    """Return a check for an integer of ``[low, high]``; booleans are none."""

    def check(value: object, name: str) -> None:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        _require(right, name, f"an integer from {low} to {high}", value)

    return check


def any_integer(value: object, name: str) -> None:
    """Check that a value is an integer of any size; booleans are none."""
    _require(type(value) is int, name, "an integer", value)


def finite(value: object, name: str) -> None:
    """Check that a value is a number that a float can hold, neither infinite nor NaN."""
    _require(_is_finite(value), name, "a finite number", value)


def _is_finite(value: object) -> bool:
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(float(value))  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond all floats
        return False


def one_of(*choices: object) -> Check:
    """Return a check for one of a few values."""

    def check(value: object, name: str) -> None:
        # Not `in`: a value may be one that cannot be hashed, and 1 equals True.
        right = any(type(value) is type(choice) and value == choice for choice in choices)
        _require(right, name, f"one of {', '.join(map(repr, choices))}", value)

    return check


def either(*checks: Check) -> Check:
    """Return a check for a value that passes one of `checks`; the last one says what is wrong."""

    def check(value: object, name: str) -> None:
        for candidate in checks[:-1]:
            try:
                return candidate(value, name)
            except SchemaError:
                continue
        return checks[-1](value, name)

    return check


def list_of(check_item: Check) -> Check:
    """Return a check for a list of such items."""

    def check(value: object, name: str) -> None:
        if not isinstance(value, list):
            raise _error(name, "a list", value)
        for index, item in enumerate(value):
            check_item(item, f"{name}[{index}]")

    return check


def tuple_of(*checks: Check) -> Check:
    """Return a check for a list with one item for each of `checks`."""

    def check(value: object, name: str) -> None:
        if not isinstance(value, list) or len(value) != len(checks):
            raise _error(name, f"a list of {len(checks)}", value)
        for index, (item, check_item) in enumerate(zip(value, checks, strict=True)):
            check_item(item, f"{name}[{index}]")

    return check


def mapping_of(check_value: Check) -> Check:
    """Return a check for an object with any names, and such values."""

    def check(value: object, name: str) -> None:
        if not isinstance(value, dict):
            raise _error(name, "an object", value)
        for key, item in value.items():
            check_value(item, f"{name}.{key}")

    return check


def record(fields: dict[str, Check]) -> Check:
    """Return a check for an object with these fields, and maybe others."""

    def check(value: object, name: str) -> None:
        if not isinstance(value, dict):
            raise _error(name, "an object", value)
        missing = fields.keys() - value.keys()
        if missing:
            raise SchemaError(f"{name} has {', '.join(sorted(fields))}; it lacks {sorted(missing)}")
        for field, check_field in fields.items():
            check_field(value[field], f"{name}.{field}")

    return check


def check_names(given: Sequence[str], wanted: Sequence[str], name: str) -> None:
    """Raise SchemaError unless both are the same names, in any order."""
    if sorted(given) != sorted(wanted):
        odd = reprlib.repr(sorted(set(given) ^ set(wanted)))
        raise SchemaError(f"{name} are those that the header tells of; {odd} are not in both")


def _require(right: bool, name: str, wanted: str, value: object) -> None:
    if not right:
        raise _error(name, wanted, value)


def _error(name: str, wanted: str, value: object) -> SchemaError:
    return SchemaError(f"{name} must be {wanted}; got {reprlib.repr(value)}")
