"""The call by which an attention layer has its attention computed: a base of :class:`Cache`."""

from __future__ import annotations

from kvcache.backends import Array
from kvcache.errors import NotSupportedError


class AttentionCalls:
    """The call of caches that compute attention themselves."""

    def attend(
        self,
        q: Array,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> Array:
        """Return attention of the pass's queries over just what each may see, after the put.

        q: ``[q_heads, tokens, head_dim]`` in the layout and dtype of the keys; over keys of float8
            in any other float dtype. q_heads is a multiple of kv_heads: query head h attends to
            key head ``h // (q_heads // kv_heads)``.
        scale: factor of the scores; None: ``head_dim ** -0.5``.
        softcap: c bounds scores to ``c * tanh(score / c)``; None: no bound.
        sinks: a logit per query head, ``[q_heads]``, that takes part in the softmax without a
            value (GPT-OSS); None: none.

        Returns ``[q_heads, tokens, value_dim]``, a new array in the layout of the keys and the
        dtype of `q`; of a layer of keys only, whose keys are its values, value_dim is head_dim. A
        query that sees nothing gets zeros. Reads the cells that the queries see, not the pool, and
        cells that several sequences share once for all of them.

        Raises: ShapeError, DTypeError, ValueError, NotSupportedError for queries that ask for
            gradients, KVCacheError without a pass or before the layer was put in it.
        """
        raise NotSupportedError(f"{type(self).__name__} computes no attention.")
