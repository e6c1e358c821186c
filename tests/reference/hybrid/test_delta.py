"""The delta rule of many tokens at once against that of one token after the other, in float64."""

import numpy as np
import pytest

from kvcache.reference.hybrid.delta import Tokens, delta_chunk, delta_step, triangles

BATCH, HEADS, GROUP, KEY_DIM, VALUE_DIM = 2, 2, 3, 8, 5


def random_tokens(length, slowest, fastest, seed=0):
    """Inputs of the rule; the logs of decays lie evenly between two orders of magnitude."""
    rng = np.random.default_rng(seed)
    queries, keys = rng.normal(size=(2, BATCH, HEADS, 1, length, KEY_DIM))
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    values = rng.normal(size=(BATCH, HEADS, GROUP, length, VALUE_DIM))
    shape = (BATCH, HEADS, GROUP, length, 1)
    decay = -np.exp(rng.uniform(np.log(slowest), np.log(fastest), shape))
    return Tokens(queries, keys, values, decay, rng.uniform(0, 1, shape))


def one_by_one(state, tokens):
    """Outputs and the last state, head by head."""
    q, k, v, log_decay, beta = tokens
    state, outputs = state.copy(), np.zeros(v.shape)
    for b, h, r, t in np.ndindex(v.shape[:4]):
        matrix, key = state[b, h, r], k[b, h, 0, t]
        matrix *= np.exp(log_decay[b, h, r, t, 0])
        matrix += np.outer(key, beta[b, h, r, t, 0] * (v[b, h, r, t] - key @ matrix))
        outputs[b, h, r, t] = q[b, h, 0, t] @ matrix
    return outputs, state


def check(backend, tokens, tolerance):
    """Compares both forms on `backend` with the rule in float64."""
    length = tokens.keys.shape[3]
    start = np.random.default_rng(9).normal(size=(BATCH, HEADS, GROUP, KEY_DIM, VALUE_DIM))
    outputs, state = one_by_one(start, tokens)

    def put(array):
        return backend.from_host(array.astype(np.float32))

    given = Tokens(*map(put, tokens))
    chunk = delta_chunk(backend.xp, triangles(backend, length), put(start), given)
    matrix, parts = put(start), []
    for t in range(length):
        output, matrix = delta_step(backend.xp, matrix, given.between(t, t + 1))
        parts.append(backend.to_host(output))
    for form in ([backend.to_host(array) for array in chunk],
                 [np.concatenate(parts, 3), backend.to_host(matrix)]):  # fmt: skip
        np.testing.assert_allclose(form[0], outputs, rtol=0, atol=tolerance)
        np.testing.assert_allclose(form[1], state, rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 37, 64])
def test_chunks(backend, length):
    check(backend, random_tokens(length, 1e-3, 1), 1e-5)


def test_fast_decays(backend):
    """Spans of e ** -1000 beside spans of one token: running sums would lose their digits."""
    check(backend, random_tokens(64, 1e-2, 30), 1e-5)


def test_one_key_again_and_again(backend):
    """The system is then all ones: powers of it overflow, its inverse does not."""
    tokens = random_tokens(64, 1e-6, 1e-5)
    keys = np.broadcast_to(tokens.keys[:, :, :, :1], tokens.keys.shape)
    check(backend, tokens._replace(keys=keys, beta=np.ones_like(tokens.beta)), 1e-4)
