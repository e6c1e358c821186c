"""Images and sounds in a prompt: their placeholder tokens become ids of their own."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterable, Mapping
from sys import getsizeof
from typing import TypeAlias
from weakref import KeyedRef, WeakValueDictionary

import numpy as np

from kvcache._checks import as_index

from .radix import Tokens

Media: TypeAlias = Mapping[tuple[int, int], bytes | str]
"""Digest of a medium by the positions ``[start, stop)`` of its placeholder tokens."""
_MAX_IDS = 2**31


def of_integer(number: int) -> int:
    """Return the bytes of memory of an integer; Python has the small ones anyway."""
    return getsizeof(number) if number > 256 else 0


class Medium:
    """An image or sound that a tree or an open session refers to.

    key: SHA-256 of its digest and its placeholder tokens, the same in every process. id: stand-in
    for each of these tokens, in this process; negative, because the id of a token never is.
    """

    __slots__ = ("__weakref__", "id", "key")

    def __init__(self, key: bytes, stand_in: int) -> None:
        self.key, self.id = key, stand_in


class Placement:
    """A medium at positions ``[start, stop)`` of a sequence.

    identifier: its digest as text, for events.
    """

    __slots__ = ("_placeholders", "identifier", "medium", "start", "stop")

    def __init__(
        self, start: int, stop: int, medium: Medium, placeholders: Tokens, identifier: str = ""
    ) -> None:
        self.start, self.stop, self.medium = start, stop, medium
        self.identifier = identifier
        # Nearly always one id, many times: once is enough.
        alike = placeholders[:1] if (placeholders == placeholders[0]).all() else placeholders
        self._placeholders = alike.tobytes()

    @property
    def placeholders(self) -> Tokens:
        """Ids that the prompt has there."""
        return np.resize(np.frombuffer(self._placeholders, np.int32), self.stop - self.start)

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes, its medium aside."""
        positions = of_integer(self.start) + of_integer(self.stop)
        texts = len(self._placeholders) + getsizeof(self.identifier)
        return _PLACEMENT_NBYTES + texts + positions


_RULE = "media map places (start, stop) in the prompt to digests, bytes or str"


class MediaIds:
    """Stand-in token ids for media, the same for equal digests of equal placeholder tokens.

    Models give all images the same placeholder ids, so a radix tree over these alone would take
    every image for the same one. A medium is forgotten with the last placement that names it.
    """

    def __init__(self) -> None:
        self._media: WeakValueDictionary[bytes, Medium] = WeakValueDictionary()
        self._next = 0
        self._taken: set[int] = set()  # ids of media from before the numbers began anew

    def substitute(self, tokens: Tokens, media: Media) -> tuple[Tokens, tuple[Placement, ...]]:
        """Return `tokens` with stand-in ids in place of all media, and where these are.

        The tokens are a copy if there are any media. Keep the placements as long as the ids: ids
        of media that no placement names are given to others.

        Raises: ValueError for a negative id outside of `media`.
        """
        check_token_ids(tokens, media)
        if not media:
            return tokens, ()
        ids, placements = tokens.copy(), []
        for (start, stop), digest in sorted(media.items(), key=lambda item: item[0]):
            name, placeholders = _name_of(digest), tokens[start:stop]
            medium = self._medium(_key_of(name, placeholders))
            placements.append(Placement(start, stop, medium, placeholders, as_text(name)))
            ids[start:stop] = medium.id
        return ids, tuple(placements)

    def _medium(self, key: bytes) -> Medium:
        medium = self._media.get(key)
        if medium is None:
            self._media[key] = medium = Medium(key, self._free_id())
        return medium

    def _free_id(self) -> int:
        """Return an id that no living medium has."""
        if self._next == _MAX_IDS:  # after years: media that live that long keep their ids
            self._next, self._taken = 0, {medium.id for medium in self._media.values()}
        self._next += 1
        return -self._next if -self._next not in self._taken else self._free_id()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all media take, but for their placements."""
        return len(self._media) * _MEDIUM_NBYTES


def _name_of(digest: bytes | str) -> bytes:
    # surrogatepass: any str will do, also one that is no valid Unicode.
    return digest.encode(errors="surrogatepass") if isinstance(digest, str) else bytes(digest)


def as_text(name: bytes) -> str:
    """Return UTF-8 as text, and other bytes as their hexadecimal digits."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.hex()


def _key_of(name: bytes, placeholders: Tokens) -> bytes:
    """Return the key of a medium.

    Of another length it is another rendering of the same, or two of it in a row.
    """
    ids = placeholders.astype("<i4", copy=False).tobytes()
    return hashlib.sha256(hashlib.sha256(name).digest() + ids).digest()


def _sizes() -> tuple[int, int]:
    """Return the bytes of a medium with its entry, and of a placement."""
    key = hashlib.sha256().digest()
    medium = Medium(key, -_MAX_IDS)
    reference = KeyedRef(medium, lambda _: None, key)
    placement = Placement(0, 1, medium, np.zeros(1, np.int32))
    number, empty, entry = getsizeof(_MAX_IDS), getsizeof(b""), 100
    return (
        getsizeof(medium) + getsizeof(reference) + getsizeof(key) + number + entry,
        getsizeof(placement) + empty,
    )


_MEDIUM_NBYTES, _PLACEMENT_NBYTES = _sizes()


def within(placements: Iterable[Placement], start: int, stop: int) -> tuple[Placement, ...]:
    """Return the `placements` with a position in ``[start, stop)``."""
    return tuple(
        placement for placement in placements if placement.start < stop and start < placement.stop
    )


def as_media(media: Media | None) -> Media:
    """Return `media` with places of plain ints; none for None.

    Raises: ValueError, TypeError for other places, or for anything but a mapping.
    """
    if media is None:
        return {}
    if not isinstance(media, Mapping):
        raise TypeError(f"{_RULE}; got {reprlib.repr(media)}.")
    return {_as_place(place): digest for place, digest in media.items()}


def _as_place(place: tuple[int, int]) -> tuple[int, int]:
    try:
        start, stop = place
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_RULE}; got {reprlib.repr(place)} for a place.") from error
    return as_index(start, "the start of a medium"), as_index(stop, "the stop of a medium")


def check_media(media: Media, tokens: int) -> None:
    """Check the places and digests of `media` in a prompt of so many tokens.

    Raises: ValueError for ranges that are empty, overlap, or leave the prompt, and for an empty
        digest; TypeError for a digest of another type.
    """
    end = 0
    for start, stop in sorted(media):
        if not end <= start < stop <= tokens:
            raise ValueError(
                f"media stand for tokens [start, stop) of the {tokens} of the prompt, one after "
                f"the other; got {reprlib.repr(sorted(media))}."
            )
        digest = media[start, stop]
        if not isinstance(digest, bytes | str):
            raise TypeError(f"a digest is bytes or str; got {reprlib.repr(digest)}.")
        if not digest:
            raise ValueError(
                f"a digest tells a medium from all others; got {digest!r} for [{start}, {stop}). "
                "Hash its content."
            )
        end = stop


def check_token_ids(tokens: Tokens, media: Media) -> None:
    """Raise ValueError for a negative id outside of `media`."""
    bad = tokens < 0
    for start, stop in media:
        bad[start:stop] = False
    if bad.any():
        raise ValueError(
            f"token ids are >= 0 where no media are; got {tokens[bad][0]}. "
            "Name the media there, or leave out padding."
        )
