"""A session that is left by an exception at any token: the next try goes on, bit for bit.

For every kind of cache, and for passes that are programs. A try computes the prompt and goes on
with tokens that are generated, until an exception is raised, between two passes or in the middle of
one, and leaves the session. Nobody commits anything. The next try of the same prompt, or of the
next turn, goes on behind the last complete pass, and is compared with a cold run of the same
passes: those of the first try as far as they were reused, and its own.
"""

from contextlib import suppress

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")

from kvcache.errors import BackendNotAvailableError
from kvcache.verify.cold import ColdRuns
from kvcache.verify.play import first_tokens, joined, pieces
from kvcache.verify.targets.nets import InterruptedPassError
from kvcache.verify.targets.reference import LAYERS, POOLS, LayersTarget, PoolTarget

from .programs import ProgramTarget

FORMS = {"layers": LayersTarget, "pool": PoolTarget, "programs": ProgramTarget}
CELLS = [
    *(("layers", kind, "numpy") for kind in LAYERS),
    *(("pool", kind, "numpy") for kind in POOLS),
    *(("programs", kind, "numpy") for kind in ("full", "window", "chunk")),
]
COMPILED = [("programs", kind, "jax") for kind in ("full", "window")]
PROMPT = tuple(int(token) for token in np.random.default_rng(3).integers(0, 64, 17))
ANSWER = (5, 9, 5, 60, 2)
WHOLE = PROMPT + ANSWER
RECURRENT_SIZES = {
    "hybrid": [(1,)]
}  # elsewhere a hit ends inside of a pass, which rounds otherwise
SIZES = [(1,), (5,), (7, 2), ()]
ANYWHERE = {"full", "chunk"}
"""Kinds that can go on at every position."""
IN_CI = {("layers", "hybrid", "numpy"), ("pool", "mixed", "numpy"), ("programs", "full", "numpy")}


def marked(cells):
    return [
        pytest.param(cell, id="-".join(cell), marks=() if cell in IN_CI else pytest.mark.matrix)
        for cell in cells
    ]


def target_of(cell):
    form, kind, backend = cell
    try:
        return FORMS[form](kind, backend, store=None)
    except BackendNotAvailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=marked(CELLS))
def target(request):
    return target_of(request.param)


class Left(BaseException):
    """Somebody cancelled the request."""


def leave(target, trial, passes, torn, layer):
    """Leave a session for the prompt by an exception: behind `passes`, or in the pass `torn`."""
    conversation = trial.begin(PROMPT)
    with suppress(Left, InterruptedPassError), conversation.session as session:
        for ids in passes:
            conversation.forward(ids)
        if torn:
            done = sum(map(len, passes))
            session.extend(WHOLE[max(done, len(PROMPT)) : done + len(torn)])  # sampled before
            target.net.interrupt = layer
            conversation.compute(torn)
        raise Left
    target.net.interrupt = None


def ended(trial, passes, prompt):
    """Compute `passes` in a session for `prompt`, which ends as it should."""
    conversation = trial.begin(prompt)
    rest = joined(tuple(passes))[conversation.held :]
    for ids in pieces(rest, (len(passes[0]),)):
        conversation.forward(ids)
    conversation.end(store=True)


def retried(trial, prompt, sizes):
    """The hit of another try, its passes, and their logits."""
    conversation = trial.begin(prompt)
    passes = pieces(prompt[conversation.held :], sizes)
    logits = [conversation.forward(ids) for ids in passes]
    conversation.end(store=True)
    return conversation.held, passes, logits


def passes_until(stop, sizes):
    """The passes of a try that ends behind `stop` tokens: the prompt in pieces, then one by one."""
    return [*pieces(PROMPT[:stop], sizes), *pieces(ANSWER[: max(0, stop - len(PROMPT))], (1,))]


def pass_behind(stop, sizes):
    """The pass that would have come behind `stop` tokens."""
    rest = PROMPT[stop:] or WHOLE[stop : stop + 1]
    return rest[: sizes[0]] if sizes else rest


def compare(target, warm, cold):
    """Raises unless both are equal bit for bit.

    The hybrid computes in float32 and adds up in the order of the cells of a pool, which another
    history has filled in another order; programs of JAX compute in float32 as well. States are
    compared bit for bit with the others, in per-layer caches.
    """
    exact = isinstance(target.net.backend.alloc((1,), "float32"), np.ndarray)
    if not exact or (isinstance(target, PoolTarget) and target.kind == "hybrid"):
        np.testing.assert_allclose(warm, cold, rtol=0, atol=1e-4)
    else:
        np.testing.assert_array_equal(warm, cold)


def check_retry(target, cold_runs, first, torn, layer, sizes):
    """Leaves a session and tries again; returns where the next try went on."""
    stop = sum(map(len, first))
    prompt = (*WHOLE[: max(stop, len(PROMPT))], 1)  # the next turn, or the prompt once more
    with target.trial() as trial:
        # Nothing tells how many layers a model has before it went through all of them once.
        ended(trial, [(1, 2, 3), (4,)], (1, 2, 3))
        leave(target, trial, first, torn, layer)
        held, passes, logits = retried(trial, prompt, sizes)
    chunks = (*first_tokens(tuple(first), held), *passes)
    assert joined(chunks) == prompt
    cold_runs.prepare([chunks])
    for number, warm in enumerate(logits, len(chunks) - len(passes) + 1):
        compare(target, warm, cold_runs.logits(chunks[:number]))
    return held


def check_every_token(target, all_sizes, every_layer=True):
    """Tries that are left at each token; without `every_layer`, in one layer of each pass."""
    count, cold_runs = target.net.layers - 1, ColdRuns(target)
    for sizes in all_sizes:
        for stop in range(len(WHOLE)):
            first, torn = passes_until(stop, sizes), pass_behind(stop, sizes)
            assert check_retry(target, cold_runs, first, (), 0, sizes) == stop
            for layer in range(count) if every_layer else [stop % count]:
                held = check_retry(target, cold_runs, first, torn, layer, sizes)
                # A ring or state that the pass had reached goes back to a resume point.
                assert held == stop if target.kind in ANYWHERE else held <= stop


def test_left_at_each_token(target):
    sizes = [(1,)] if target.kind == "hybrid" else [(5,)]
    check_every_token(target, sizes, every_layer=False)


@pytest.mark.matrix
def test_left_at_each_token_of_passes_of_any_size(target):
    check_every_token(target, RECURRENT_SIZES.get(target.kind, SIZES))


@pytest.mark.matrix
@pytest.mark.parametrize("cell", COMPILED, ids="-".join)
def test_left_at_each_token_of_compiled_passes(cell):
    check_every_token(target_of(cell), [(1,), (5,)])


def test_every_depth_of_a_hit(target):
    """Prompts that part from an earlier one behind each of its tokens."""
    depths = set()
    sizes = (1,) if target.kind == "hybrid" else (5,)
    for depth in range(1, len(PROMPT) + 1):
        prompt = (*PROMPT[:depth], 33, 34)
        with target.trial() as trial:
            for _ in range(2):  # where they part, a window or state can be resumed at from then on
                ended(trial, pieces(PROMPT, sizes), PROMPT)
                retried(trial, prompt, sizes)
            held, passes, logits = retried(trial, (*prompt[:-1], 35), sizes)
        depths.add(held)
        first = first_tokens(tuple(pieces((*PROMPT[:depth], 33), sizes)), held)
        cold = target.cold((*first, *passes))[-len(passes) :]
        for warm_rows, cold_rows in zip(logits, cold, strict=True):
            compare(target, warm_rows, cold_rows)
    assert depths == {depth + 1 for depth in range(1, len(PROMPT) + 1)}
