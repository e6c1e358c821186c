"""Images and sounds in a prompt: their placeholder tokens become ids of their own."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TypeAlias

from kvcache._checks import as_index

from .radix import Tokens

Media: TypeAlias = Mapping[tuple[int, int], bytes | str]
"""Digest of a medium by the positions ``[start, stop)`` of its placeholder tokens."""

_RULE = "media map places (start, stop) in the prompt to digests, bytes or str"


class MediaIds:
    """Stand-in token ids for media, the same for equal digests of equal length.

    Models give all images the same placeholder ids, so a radix tree over these alone would take
    every image for the same one.
    """

    def __init__(self) -> None:
        self._ids: dict[tuple[bytes, int], int] = {}

    def substitute(self, tokens: Tokens, media: Media) -> Tokens:
        """Return `tokens` with stand-in ids in place of all media; a copy if there are any.

        Raises: ValueError for a negative id outside of `media`.
        """
        check_token_ids(tokens, media)
        if media:
            tokens = tokens.copy()
        for (start, stop), digest in media.items():
            # In another length it is another rendering of the same, or two of it in a row.
            # surrogatepass: any str will do, also one that is no valid Unicode.
            text = digest.encode(errors="surrogatepass") if isinstance(digest, str) else digest
            name = bytes(text), stop - start
            # Negative, because the id of a token never is.
            tokens[start:stop] = self._ids.setdefault(name, -1 - len(self._ids))
        return tokens

    def clear(self) -> None:
        """Forget all media. Ids are given out anew, so no tree may hold old ones."""
        self._ids.clear()


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
