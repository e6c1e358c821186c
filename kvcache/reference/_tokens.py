"""Token ids given to a language model, checked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcache.backends import HostArray
from kvcache.errors import BoundsError, ShapeError


def checked_ids(tokens: npt.ArrayLike, vocab_size: int) -> HostArray:
    """Return `tokens` as int32 [B, L].

    Raises: ShapeError unless they are integers of such a shape, none of it 0; BoundsError for one
        that is no id of the vocabulary.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ShapeError(
            "tokens must be integers of shape [batch, tokens], at least one each; "
            f"got {ids.dtype} {ids.shape}."
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise BoundsError(
            f"token ids must lie in [0, {vocab_size}); got {ids.min()} to {ids.max()}. "
            "Use the tokenizer of the same file."
        )
    return ids.astype(np.int32)
