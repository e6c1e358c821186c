"""Keys of values that another program names, and hashes by a recipe of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from .outcomes import Key


class NamedKeys:
    """Keys within a namespace: digests of everything that tells it from others, and of a name.

    fields: what values depend on besides their names, such as a model, a dtype, a layout and a
    rank, as JSON has them. Two namespaces that differ in one of them have no key in common.
    """

    def __init__(self, fields: Mapping[str, object]) -> None:
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        self._seed = hashlib.sha256(b"kvcache named values 1" + text.encode()).digest()

    def key(self, name: bytes) -> Key:
        """Return the key of a name."""
        return hashlib.sha256(self._seed + name).digest()
