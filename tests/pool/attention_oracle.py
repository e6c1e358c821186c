"""Attention computed one query at a time in float64, from positions alone."""

import numpy as np

from kvcache.backends import HOST_DTYPES

KV_HEADS, Q_HEADS, HEAD_DIM = 2, 6, 8


def attention(q, keys, values, scale, softcap=None, sinks=None):
    """Attention of one query ``[q_heads, dim]`` over ``[kv_heads, columns, dim]``."""
    q, keys, values = (np.asarray(array, np.float64) for array in (q, keys, values))
    group = q.shape[0] // keys.shape[0]
    out = []
    for head, row in enumerate(q):
        scores = keys[head // group] @ row * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        extra = np.array([] if sinks is None else [sinks[head]], np.float64)
        largest = np.concatenate([scores, extra]).max()
        weights = np.exp(scores - largest)
        total = weights.sum() + np.exp(extra - largest).sum()
        out.append(weights @ values[head // group] / total)
    return np.array(out)


class History:
    """What each sequence should hold: the key and value of each position."""

    def __init__(self, backend, dtype="float32", seed=0, value_dim=HEAD_DIM):
        self.backend, self.dtype, self.value_dim = backend, dtype, value_dim
        self.rng = np.random.default_rng(seed)
        self.held = {}

    def random(self, *shape):
        return self.rng.normal(size=shape).astype(np.float32).astype(HOST_DTYPES[self.dtype])

    def put(self, cache, positions, sequences, axes="htd", value_axes=None):
        """Put tokens of a pass, begun already; return the queries, in the layout of the cache."""
        tokens = len(positions)
        keys = self.random(KV_HEADS, tokens, HEAD_DIM)
        values = self.random(KV_HEADS, tokens, self.value_dim) if self.value_dim else keys
        for i, (position, sequence) in enumerate(zip(positions, sequences, strict=True)):
            self.held.setdefault(sequence, {})[position] = keys[:, i], values[:, i]
        cache.set_layer(0)
        put = [(keys, axes), (values, value_axes or axes)][: 2 if self.value_dim else 1]
        cache.put(*(self.to_device(array, own) for array, own in put))
        return self.random(Q_HEADS, tokens, HEAD_DIM)

    def to_device(self, array, axes):
        return self.backend.from_host(array.transpose(["htd".index(axis) for axis in axes]))

    def copy(self, source, target, length):
        self.held[target] = {p: row for p, row in self.held[source].items() if p < length}

    def expected(self, q, positions, sequences, sees=None, **scoring):
        """The outputs of a pass. sees: of a token's index, position and another position."""
        outputs = []
        for i, (position, sequence) in enumerate(zip(positions, sequences, strict=True)):
            held = self.held[sequence]
            visible = [
                p for p in sorted(held) if (p <= position if sees is None else sees(i, position, p))
            ]
            keys, values = (np.stack([held[p][part] for p in visible], 1) for part in (0, 1))
            outputs.append(attention(q[:, i], keys, values, **scoring))
        return np.stack(outputs, 1)
