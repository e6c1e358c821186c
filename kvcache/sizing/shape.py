"""Numbers that the layers of a model hold for one sequence, and the bytes of them."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.backends import HOST_DTYPES
from kvcache.errors import DTypeError


@dataclass(frozen=True)
class TokenLayers:
    """Layers that hold something for each token: keys and values, or a latent vector.

    layers: how many. numbers: held by each of them per token. window: tokens that they see, None
    for all.
    """

    layers: int
    numbers: int
    window: int | None = None

    def held(self, tokens: int) -> int:
        """Return how many of so many tokens a layer holds."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class RecurrentLayers:
    """Layers with a state, whose size does not depend on the number of tokens.

    layers: how many. conv: inputs of a convolution that one of them holds, of the dtype of keys and
    values. state: numbers of its recurrent state, 0 for none.
    """

    layers: int
    conv: int
    state: int


@dataclass(frozen=True)
class ModelShape:
    """The numbers that one sequence has in the caches of a model.

    A layer may hold both tokens and a state, as in Falcon-H1.
    """

    family: str
    layers: int
    tokens: tuple[TokenLayers, ...]
    recurrent: tuple[RecurrentLayers, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Bytes of one sequence.

    per_token: of a token, in layers that see all tokens. per_window_token: of a token, in layers
    with a window, as long as they hold it. window: tokens of the longest one. full_windows: bytes
    of all windows when they are full. per_state: of all recurrent states together.
    """

    per_token: int
    per_window_token: int
    window: int
    full_windows: int
    per_state: int

    @property
    def state_tokens(self) -> float | None:
        """Tokens whose keys and values are as large as one state; None without such layers."""
        return self.per_state / self.per_token if self.per_token else None


def sizes_of(shape: ModelShape, dtype: str, state_dtype: str) -> Sizes:
    """Return the bytes of one sequence.

    dtype: of keys, values and convolutions. state_dtype: of recurrent states.

    Raises: DTypeError for a dtype that kvcache does not have.
    """
    itemsize, state_itemsize = _itemsize(dtype), _itemsize(state_dtype)
    whole = [group for group in shape.tokens if group.window is None]
    windows = [(group, group.window) for group in shape.tokens if group.window is not None]
    return Sizes(
        per_token=sum(group.layers * group.numbers for group in whole) * itemsize,
        per_window_token=sum(group.layers * group.numbers for group, _ in windows) * itemsize,
        window=max((window for _, window in windows), default=0),
        full_windows=sum(group.layers * group.numbers * window for group, window in windows)
        * itemsize,
        per_state=sum(
            group.layers * (group.conv * itemsize + group.state * state_itemsize)
            for group in shape.recurrent
        ),
    )


def bytes_at(shape: ModelShape, tokens: int, dtype: str, state_dtype: str) -> int:
    """Return the bytes of a sequence of so many tokens, with one state behind the last one."""
    itemsize = _itemsize(dtype)
    held = sum(group.layers * group.numbers * group.held(tokens) for group in shape.tokens)
    return held * itemsize + sizes_of(shape, dtype, state_dtype).per_state


def _itemsize(dtype: str) -> int:
    if dtype not in HOST_DTYPES:
        raise DTypeError(f"a dtype is one of {', '.join(HOST_DTYPES)}; got {dtype!r}.")
    return HOST_DTYPES[dtype].itemsize
