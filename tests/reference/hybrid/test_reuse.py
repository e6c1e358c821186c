"""Logits after a hit are those of a cold run, for every mixture of layers.

Two ways of comparing, both on NumPy. With the same calls, every bit of float32 is the same. With
calls that end elsewhere, matmuls of other shapes round otherwise: so the model computes in float64,
its caches hold the very bits, and what is left is far below anything that a wrong state would do.
"""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache
from kvcache import CausalCache, KVCache, RecurrentCache, RotatingKVCache, StateCache, WrapperCache
from kvcache.errors import TrimError
from kvcache.prefix import PrefixCache
from kvcache.reference.decoder import PassPart
from kvcache.reference.hybrid.model import Hybrid
from kvcache.reference.hybrid.pooled import HybridPass
from kvcache.reference.hybrid.stages import Stages

from .conftest import load

ROTATING = {"kind": "rotating", "max_size": 9, "keep": 2}
# By name, the recurrent ones of four layers, and the caches of the others.
KINDS = {
    "recurrent": ((0, 1, 2, 3), {}),
    "recurrent and full": ((0, 2), {}),
    "recurrent, window and sinks": ((0, 2), ROTATING),
}
POOLS = {
    "pool, recurrent": ((0, 1, 2, 3), None),
    "pool, recurrent and full": ((0, 2), None),
    "pool, recurrent and window": ((0, 2), 7),
}
PIECE = 7  # tokens of a call, at most


def bits(array):
    return np.ascontiguousarray(array).view(np.int32)


class BitsOfState(StateCache):
    """Holds float64, as two int32 for each number."""

    @property
    def state(self):
        return tuple(array.view(np.float64) for array in super().state)

    def advance(self, tokens, *arrays):
        super().advance(tokens, *map(bits, arrays))

    def record(self, position, *arrays):
        super().record(position, *map(bits, arrays))


class BitsOfTokens:
    """Of a cache of keys and values."""

    def update(self, keys, values):
        keys, values = super().update(bits(keys), bits(values))
        return keys.view(np.float64), values.view(np.float64)


class BitsOfAll(BitsOfTokens, KVCache):
    pass


class BitsOfRing(BitsOfTokens, RotatingKVCache):
    pass


class BitsOfStates(RecurrentCache):
    def get_states(self):
        states = super().get_states()
        return states and tuple(array.view(np.float64) for array in states)

    def put_states(self, *arrays, kept=None):
        kept = {cut: tuple(map(bits, state)) for cut, state in (kept or {}).items()}
        super().put_states(*map(bits, arrays), kept=kept)


class BitsOfCells(CausalCache):
    """Of a pool: attention is computed in float64, over the range that has the pass."""

    def attend(self, q, **_):
        *arrays, mask = self.get()
        q, keys, values = (np.ascontiguousarray(array).view(np.float64) for array in (q, *arrays))
        group = len(q) // len(keys)
        scores = q @ keys.repeat(group, axis=0).swapaxes(1, 2) * q.shape[-1] ** -0.5
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ values.repeat(group, axis=0)


class Exact(Hybrid):
    """Computes in the dtype of its weights."""

    def _through(self, cache, k, v):
        return cache.update(k, v)

    def make_caches(self, kind="kv", max_size=0, keep=0):
        def attention_cache():
            return BitsOfAll() if kind == "kv" else BitsOfRing(max_size, keep)

        return kvcache.LayerCaches(
            BitsOfState() if recurrent else attention_cache() for recurrent in self.config.recurrent
        )


class ExactPass(HybridPass):
    def _stored(self, array):
        return bits(array[0])

    def _computed(self, array):
        return array[None]


def in_float64(arrays):
    """Weights, converted."""
    if not isinstance(arrays, tuple):
        return arrays.astype(np.float64)
    parts = map(in_float64, arrays)
    return type(arrays)(*parts) if hasattr(arrays, "_fields") else tuple(parts)


@pytest.fixture(scope="module")
def numpy_models(write_checkpoint):
    """Models on NumPy by their recurrent layers."""
    backend = kvcache.get_backend("numpy")
    return {
        layers: load(write_checkpoint(recurrent=layers), backend)
        for layers in dict.fromkeys(layers for layers, _ in KINDS.values())
    }


class InLayers:
    """A model with the caches of its layers, in sessions of a prefix cache and without."""

    def __init__(self, model, options, exact=True):
        self.model = model
        if exact:
            self.model = Exact(
                model.config, in_float64(model.weights), model.backend, model.stages.chunk
            )
        self.options = options
        self.prefix = PrefixCache(self.caches())

    def caches(self):
        return self.model.make_caches(**self.options)

    def run(self, session, ids, position):
        """Logits of one call of a session, [tokens, vocab]."""
        return self.model([ids], session.caches, last_only=False)[0]

    def cold(self, ids):
        return self.model([ids], self.caches(), last_only=False)[0]

    def checkpoint(self, session):
        session.caches.checkpoint()

    def accept(self, session, start, accepted):
        """Keep so many tokens of the draft that began at `start`."""
        session.caches.rollback(accepted)


class InPool:
    """The same, over one pool."""

    def __init__(self, model, window, resume_points=40):
        weights = in_float64(model.weights)
        parts = [] if all(model.config.recurrent) else [BitsOfCells(window=window)]
        cache = WrapperCache(*parts, BitsOfStates(resume_points))
        sizes = {"max_sequences": 2, "capacity": 60, "max_batch": PIECE}
        cache.init(model.backend, "int32", **sizes)
        self.forward = ExactPass(Stages(model.backend, model.config, 64), weights, cache, "int32")
        self.prefix = PrefixCache(cache, sequences=[0])

    def run(self, session, ids, position):
        return self._run(session.sequence, ids, position)

    def checkpoint(self, session):
        self.forward.cache.checkpoint(session.sequence)

    def accept(self, session, start, accepted):
        session.truncate(start + accepted)

    def _run(self, sequence, ids, position):
        return self.forward.logits([PassPart(sequence, position, ids, last=True)], last_only=False)

    def cold(self, ids):
        self.forward.cache.remove(1, 0)
        pieces = range(0, len(ids), PIECE)
        return np.concatenate([self._run(1, ids[at : at + PIECE], at) for at in pieces])


def make(numpy_models, name, **limits):
    """A server. limits: of a pool."""
    layers, options = (KINDS | POOLS)[name]
    if name in KINDS:
        return InLayers(numpy_models[layers], options)
    return InPool(numpy_models[layers], options, **limits)


TOKENS = st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=12)
REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 9),  # the conversation that it goes on from
        st.integers(0, 50),  # up to where
        TOKENS,  # what it adds
        TOKENS,  # the answer
        st.sampled_from(["end", "end", "truncate", "cancel"]),
        st.lists(st.integers(1, 30), max_size=2),  # resume points
        st.integers(1, PIECE),  # tokens of a call
    ),
    min_size=2,
    max_size=5,
)


def ask(server, prompt, answer, fate, points, piece):
    """One request; returns the hit, the logits by position, and what was said in the end."""
    found, said = {}, [*prompt, *answer]
    try:
        with server.prefix.session(prompt, resume_points=points) as session:
            at = hit = session.matched
            while at < len(said):
                if at == len(prompt):
                    session.extend(answer)
                ids = said[at : min(at + piece, len(prompt) if at < len(prompt) else len(said))]
                rows = server.run(session, ids, at)
                found |= {at + i: row for i, row in enumerate(rows)}
                at += len(ids)
                if fate == "cancel" and at >= len(prompt):
                    leave()
            if fate == "truncate":  # the answer is taken back
                with suppress(TrimError):  # a ring that has gone too far
                    session.truncate(len(prompt))
                    said = prompt
    except Cancelled:
        said = prompt
    return hit, found, said


class Cancelled(Exception):  # noqa: N818 - nothing is wrong
    """The user went away."""


def leave():
    raise Cancelled


@pytest.mark.parametrize("name", [*KINDS, *POOLS])
def test_random_conversations(numpy_models, name):
    hits = set()

    @settings(max_examples=max(20, settings().max_examples // 4))
    @given(REQUESTS)
    def check(requests):
        server, told = make(numpy_models, name), [[]]
        for base, cut, more, answer, fate, points, piece in requests:
            before = told[base % len(told)]
            prompt = [*before[: cut % (len(before) + 1)], *more][:40]
            hit, found, said = ask(server, prompt, answer, fate, points, piece)
            cold = server.cold([*prompt, *answer])
            for position, row in found.items():
                np.testing.assert_allclose(row, cold[position], rtol=1e-9, atol=1e-9)
            told.append(said)
            hits.add(hit)
        server.prefix.clear()
        assert server.prefix.stats.nbytes == 0

    check()
    assert len(hits) > 5


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_bit_with_the_same_calls(numpy_models, name, seed):
    """Turns, returns to earlier ones and other turns there, beside caches that nothing restored."""
    layers, options = KINDS[name]
    server = InLayers(numpy_models[layers], options, exact=False)
    rng = np.random.default_rng(seed)
    ends = {(): server.caches()}  # behind prompts and answers
    for _ in range(8):
        base = list(ends)[rng.integers(len(ends))]
        prompt = [*base, *rng.integers(0, 64, rng.integers(1, 90)).tolist()]
        answer = rng.integers(0, 64, rng.integers(1, 5)).tolist()
        caches = ends[base].copy()
        with server.prefix.session(prompt) as session:
            assert session.matched == len(base)
            # As a session does, and so with the same cuts.
            caches.schedule([len(prompt) - 1, len(prompt)])
            for ids in (prompt[len(base) :], *([token] for token in answer)):
                warm = server.model([ids], session.caches, last_only=False)
                cold = server.model([ids], caches, last_only=False)
                np.testing.assert_array_equal(warm, cold)
                if len(ids) > 1 or caches.offset == len(prompt):
                    ends[tuple(prompt)] = caches.copy()
            session.extend(answer)
        ends[tuple(prompt + answer)] = caches


@pytest.mark.parametrize("name", [*KINDS, *POOLS])
@pytest.mark.parametrize("accepted", range(6))
def test_speculation(numpy_models, name, accepted):
    """The logits of the next tokens and of the next turn are those without a draft."""
    server = make(numpy_models, name)
    rng = np.random.default_rng(accepted)
    prompt, draft = rng.integers(0, 64, 20).tolist(), rng.integers(0, 64, 5).tolist()
    said = [*prompt, *draft[:accepted], 7, 9]
    with server.prefix.session(prompt) as session:
        for at in range(0, len(prompt), PIECE):
            server.run(session, prompt[at : at + PIECE], at)
        server.checkpoint(session)
        server.run(session, draft, len(prompt))
        server.accept(session, len(prompt), accepted)
        rows = server.run(session, [7, 9], len(said) - 2)
        session.extend(said[len(prompt) :])
    cold = server.cold([*said, 11])
    np.testing.assert_allclose(rows, cold[-3:-1], rtol=1e-9, atol=1e-9)
    with server.prefix.session([*said, 11]) as session:
        assert session.matched == len(said)
        np.testing.assert_allclose(
            server.run(session, [11], len(said)), cold[-1:], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("name", [*KINDS, *POOLS])
def test_many_drafts_push_out_no_resume_point(numpy_models, name):
    """Beside three resume points there is room for one draft, in the cache and in the session."""
    server = make(numpy_models, name, resume_points=3 + 5)
    rng = np.random.default_rng(0)
    said = prompt = rng.integers(0, 64, 20).tolist()
    with server.prefix.session(prompt, resume_points=[10]) as session:
        for at in range(0, len(prompt), PIECE):
            server.run(session, prompt[at : at + PIECE], at)
        for accepted in [1, 3, 5, 0, 2, 4, 5, 1, 1]:
            draft = rng.integers(0, 64, 5).tolist()
            server.checkpoint(session)
            server.run(session, draft, len(said))
            server.accept(session, len(said), accepted)
            session.extend(draft[:accepted])
            said = [*said, *draft[:accepted]]
        rows = server.run(session, [7], len(said))
        session.extend([7])
    said = [*said, 7]
    cold = server.cold([*said, 11])
    np.testing.assert_allclose(rows, cold[-2:-1], rtol=1e-9, atol=1e-9)
    hits = [len(said), len(prompt) - 1, 10]
    for length, ids in zip(hits, ([*said, 11], prompt, [*prompt[:10], 9]), strict=True):
        with server.prefix.session(ids) as session:
            assert session.matched == length
            rest = server.run(session, ids[length:][:PIECE], length)
            expected = server.cold(ids)[length:][:PIECE]
            np.testing.assert_allclose(rest, expected, rtol=1e-9, atol=1e-9)
    for length in range(len(prompt), len(said)):  # no state of a draft was stored
        with server.prefix.session([*said[:length], 70]) as session:
            assert session.matched == len(prompt)
