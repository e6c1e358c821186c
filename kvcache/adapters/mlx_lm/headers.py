"""The part of an entry that is no array, in the files that mlx-lm writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvcache.errors import ForeignFileError


class Header(NamedTuple):
    """The host's part of the state of an entry.

    options: arguments of the constructor of the cache. offset: tokens seen. rows: of a batch.
    padding: of each row; () if no row has any.
    """

    options: dict[str, Any]
    offset: int
    rows: int
    padding: Sequence[int]

    def encoded(self) -> str:
        """Return the header as text."""
        return json.dumps(self._asdict())


def decoded(text: object) -> Header:
    """Return the header in `text`. Raises: ForeignFileError for other text, or none."""
    try:
        fields = json.loads(str(text))
        header = Header(**fields)
        int(header.offset), int(header.rows), dict(header.options), list(header.padding)
    except (TypeError, ValueError) as error:
        raise ForeignFileError(
            f"the state of an entry ends with a header; got {text!r:.80}. Load "
            "files only as what saved them."
        ) from error
    return header
