"""Token ids of a sequence, as far as they tell what its rows are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .arguments import check_text
from .media import Media, Placement, as_media, check_media
from .radix import Tokens, as_tokens


class KnownTokens:
    """Token ids of one sequence from position 0 on, each of rows that a cold run would leave.

    Tokens are appended as they are named, and cut off when their rows go. Where rows change
    otherwise (later ones moved into a gap, say) no token is known any more, nor becomes known,
    until these rows are gone: the rows of a token depend on all tokens before it.

    ids: of the prompt, with stand-ins for media. salt: of the request. media: where the stand-ins
    are.
    """

    def __init__(self, ids: Tokens, salt: str, media: tuple[Placement, ...] = ()) -> None:
        self.salt, self.media = salt, media
        self.unchanged: int = ids.size
        """Tokens from the beginning whose rows have been there all along."""
        self._pieces, self._size = [ids], ids.size
        self._lost = False  # True while rows behind the known tokens are of no run

    def __len__(self) -> int:
        return self._size

    @property
    def ids(self) -> Tokens:
        """The ids, int32 [tokens]."""
        if len(self._pieces) > 1:
            self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0]

    def append(self, ids: Tokens) -> None:
        """Name the tokens behind the known ones. Takes ownership of `ids`."""
        if not self._lost:
            self._pieces.append(ids)
            self._size += ids.size

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on, whose rows are gone."""
        if length <= self._size:
            self._lost = False
        self.cut(length)

    def invalidate(self, start: int) -> None:
        """Forget the tokens from position `start` on, whose rows are not theirs alone."""
        self._lost = True
        self.cut(start)

    def look_ahead(self, start: int, stop: int) -> None:
        """Forget the tokens from `start` on, whose rows depend on all before `stop`.

        Except within one medium: that is found as a whole or not at all.
        """
        inside = any(medium.start <= start and stop <= medium.stop for medium in self.media)
        if stop > start + 1 and not inside:
            self.invalidate(start)

    def replace(self, source: KnownTokens | None, length: int) -> None:
        """Become the first `length` tokens of `source`; unknown for None, or for another salt."""
        self.unchanged = 0
        if source is None or source.salt != self.salt:
            return self.invalidate(0)
        self._pieces, self._size = [source.ids[:length]], min(length, len(source))
        self._lost = source._lost and length > len(source)
        self.media = source.media
        return None

    def cut(self, length: int) -> None:
        """Forget the tokens from position `length` on, whatever has become of their rows."""
        self.unchanged = min(self.unchanged, length)
        if length < self._size:
            self._pieces, self._size = [self.ids[:length]], length


def own_tokens(tokens: npt.ArrayLike | Sequence[int]) -> Tokens:
    """Return token ids as a read-only int32 array that nobody else can change.

    Raises: ValueError for anything but a list of 32-bit integers.
    """
    ids = as_tokens(tokens)
    if ids is tokens:
        ids = np.array(ids)
    ids.flags.writeable = False
    return ids


def checked_prompt(
    tokens: Sequence[int] | Tokens, salt: str, media: Media | None
) -> tuple[Tokens, Media]:
    """Return the token ids of a prompt as :func:`own_tokens` does, and its media.

    Raises: ValueError, TypeError for no tokens, and for other media or salts than sessions take.
    """
    prompt, places = own_tokens(tokens), as_media(media)
    check_text(salt, "a salt tells tenants apart")
    if not prompt.size:
        raise ValueError("a prompt has at least one token; got none.")
    check_media(places, prompt.size)
    return prompt, places
