"""Keys: digests of everything that a page depends on, chained page after page.

The key of a page covers its tokens, all tokens before it, the media among them, and the namespace.
So two processes that never heard of each other find each other's pages, and only those that they
would have computed alike.

::

    seed     SHA-256 of "kvcache namespace 1" and of each field of the namespace
    page n   SHA-256 of "kvcache page", the key of page n - 1 (of page 0: the seed), and content
    state    SHA-256 of "kvcache state", the key of the last page before, and content behind it

Content is the number of tokens, their ids as little-endian int32, the number of media that have
tokens there, and of each medium, by position: start and stop relative to the first token, as
little-endian int64, and the SHA-256 of its digest.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from kvcache._checks import as_index, as_int32s, as_sizes

from .outcomes import Key

_ID_NBYTES = 4


@dataclass(frozen=True)
class Namespace:
    """Everything besides tokens and media that content of caches depends on, as text.

    Pages of one namespace are never found from another one. Fields that do not apply are "".

    model: fingerprint of architecture and weights. dtype: of the computation and of the cache.
    layout: of the arrays, such as a digest of their form. rope: parameters of the position
    encoding. adapter: fingerprint of a LoRA adapter. salt: of a tenant; requests with different
    salts share nothing.
    """

    model: str
    dtype: str = ""
    layout: str = ""
    rope: str = ""
    adapter: str = ""
    salt: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value: object = getattr(self, field.name)
            if not isinstance(value, str):
                raise TypeError(
                    f"fields of a namespace are str; got {reprlib.repr(value)} for {field.name}."
                )

    @property
    def seed(self) -> Key:
        """Digest of all fields, from which chains begin."""
        digest = hashlib.sha256(b"kvcache namespace 1")
        for field in fields(self):
            # surrogatepass: any str will do, also one that is no valid Unicode.
            text = getattr(self, field.name).encode(errors="surrogatepass")
            digest.update(len(text).to_bytes(8, "little"))  # else "ab", "" would equal "a", "b"
            digest.update(text)
        return digest.digest()


class _Medium(NamedTuple):
    start: int
    stop: int
    digest: bytes


class KeyChain:
    """Keys of the pages of one sequence, which grows.

    page_tokens: tokens of a page; all who share a store use the same number.

    ::

        chain = KeyChain(Namespace(model="smollm2-135m"), page_tokens=64)
        chain.extend(prompt)
        store.contains(chain.page_keys)
    """

    def __init__(self, namespace: Namespace, page_tokens: SupportsIndex) -> None:
        [self.page_tokens] = as_sizes(page_tokens=page_tokens)
        self.namespace = namespace
        self._seed = namespace.seed
        self._ids = b""
        self._media: tuple[_Medium, ...] = ()
        self._keys: tuple[Key, ...] = ()

    def __len__(self) -> int:
        """Return the number of tokens so far."""
        return len(self._ids) // _ID_NBYTES

    @property
    def page_keys(self) -> tuple[Key, ...]:
        """Keys of all full pages, the first page first."""
        return self._keys

    def extend(
        self, tokens: npt.ArrayLike, media: Mapping[tuple[int, int], bytes | str] | None = None
    ) -> None:
        """Append tokens.

        tokens: ids, integers >= 0; where media are, of any value, the placeholders of the prompt.
        media: digest of each medium by the positions ``[start, stop)`` of its placeholders, in the
            sequence; each begins in `tokens`, and may end behind them.

        Raises: ValueError for tokens that are no list of int32, for negative ids outside of media,
            and for media that overlap or do not begin in `tokens`; TypeError for another digest.
        """
        ids = as_int32s(tokens, "token ids").astype("<i4")
        first, stop = len(self), len(self) + ids.size
        added = _as_media(media, first, stop, self._media)
        _check_ids(ids, first, (*self._media[-1:], *added))
        joined, known = self._ids + ids.tobytes(), (*self._media, *added)
        keys = list(self._keys)
        for page in range(len(keys), stop // self.page_tokens):
            begin, end = page * self.page_tokens, (page + 1) * self.page_tokens
            parent = keys[-1] if keys else self._seed
            keys.append(_digest(b"kvcache page", parent, joined, known, begin, end))
        self._ids, self._media, self._keys = joined, known, tuple(keys)

    def parent_of(self, position: SupportsIndex) -> Key:
        """Return the key of the last full page that ends at `position` or before it.

        Without one, the seed of the namespace.

        Raises: ValueError for a position behind the last token.
        """
        page = self._checked(position) // self.page_tokens
        return self._keys[page - 1] if page else self._seed

    def state_key(self, position: SupportsIndex) -> Key:
        """Return the key of the state behind `position` tokens: of what pages do not hold.

        Recurrent states, and rows of windows, exist at some positions only, which need not be at
        the end of a page.

        Raises: ValueError for a position behind the last token.
        """
        stop = self._checked(position)
        start = stop // self.page_tokens * self.page_tokens
        parent = self.parent_of(stop)
        return _digest(b"kvcache state", parent, self._ids, self._media, start, stop)

    def _checked(self, position: SupportsIndex) -> int:
        checked = as_index(position, "position")
        if not 0 <= checked <= len(self):
            raise ValueError(
                f"keys are of positions 0 to {len(self)}, the tokens so far; got {checked}. "
                "Extend the chain first."
            )
        return checked


def _digest(
    kind: bytes, parent: Key, ids: bytes, media: tuple[_Medium, ...], start: int, stop: int
) -> Key:
    """Return the digest of the tokens ``[start, stop)`` behind `parent`."""
    inside = [medium for medium in media if medium.start < stop and start < medium.stop]
    digest = hashlib.sha256(kind)
    digest.update(parent)
    digest.update((stop - start).to_bytes(8, "little"))
    digest.update(ids[start * _ID_NBYTES : stop * _ID_NBYTES])
    digest.update(len(inside).to_bytes(8, "little"))
    for medium in inside:
        place = np.array([medium.start - start, medium.stop - start], "<i8")
        digest.update(place.tobytes() + medium.digest)
    return digest.digest()


def _as_media(
    media: Mapping[tuple[int, int], bytes | str] | None,
    first: int,
    stop: int,
    before: tuple[_Medium, ...],
) -> tuple[_Medium, ...]:
    """Return media by position, each beginning in ``[first, stop)`` and behind those `before`."""
    added, end = [], max([first, *(medium.stop for medium in before[-1:])])
    for place, digest in sorted((media or {}).items(), key=lambda item: item[0]):
        start = as_index(place[0], "the start of a medium")
        end_of_medium = as_index(place[1], "the stop of a medium")
        if not end <= start < min(end_of_medium, stop):
            raise ValueError(
                f"media begin in the tokens [{first}, {stop}) that come with them, one behind the "
                f"other; got {place}."
            )
        added.append(_Medium(start, end_of_medium, _media_digest(digest)))
        end = end_of_medium
    return tuple(added)


def _media_digest(digest: bytes | str) -> bytes:
    if not isinstance(digest, bytes | str):
        raise TypeError(f"a digest is bytes or str; got {reprlib.repr(digest)}.")
    if not digest:
        raise ValueError(
            f"a digest tells a medium from all others; got {digest!r}. Hash its content."
        )
    # surrogatepass: any str will do, also one that is no valid Unicode.
    name = digest.encode(errors="surrogatepass") if isinstance(digest, str) else digest
    return hashlib.sha256(name).digest()


def _check_ids(ids: npt.NDArray[np.int32], first: int, media: tuple[_Medium, ...]) -> None:
    """Raise ValueError for a negative id outside of `media`."""
    bad = ids < 0
    for medium in media:
        bad[max(medium.start - first, 0) : max(medium.stop - first, 0)] = False
    if bad.any():
        raise ValueError(
            f"token ids are >= 0 where no media are; got {ids[bad][0]}. "
            "Name the media there, or leave out padding."
        )
