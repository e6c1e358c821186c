"""A session that is killed at any token: what it committed serves the next try, bit for bit.

On NumPy, for every kind of cache. A try computes the prompt, goes on with tokens that were
generated, commits, and is dropped without an end. The next one is compared with a cold run of the
same passes: those of the first try as far as they were reused, and its own.
"""

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")

from kvcache.verify.play import first_tokens, joined, pieces
from kvcache.verify.targets.reference import LAYERS, POOLS, LayersTarget, PoolTarget

FORMS = {"layers": LayersTarget, "pool": PoolTarget}
CELLS = [("layers", kind) for kind in LAYERS] + [("pool", kind) for kind in POOLS]
PROMPT = tuple(int(token) for token in np.random.default_rng(3).integers(0, 64, 17))
ANSWER = (5, 9, 5, 60, 2)
RECURRENT_SIZES = {
    "hybrid": [(1,)]
}  # elsewhere a hit ends inside of a pass, which rounds otherwise
SIZES = [(1,), (5,), (7, 2), ()]


IN_CI = {("layers", "hybrid"), ("pool", "mixed")}


def marked():
    for cell in CELLS:
        yield pytest.param(
            cell, id="-".join(cell), marks=() if cell in IN_CI else pytest.mark.matrix
        )


@pytest.fixture(scope="module", params=marked())
def target(request):
    form, kind = request.param
    return FORMS[form](kind)


def killed(trial, passes, prompt):
    """Computes `passes` in a session for `prompt`, commits them, and drops the session."""
    conversation = trial.begin(prompt)
    for ids in passes:
        conversation.forward(ids)
    conversation.session.commit()
    conversation.end(store=False)


def retried(trial, tokens, prompt, sizes):
    """The hit of another try, its passes, and their logits."""
    conversation = trial.begin(prompt)
    held = conversation.held
    passes = pieces(tokens[held:], sizes)
    logits = [conversation.forward(ids) for ids in passes]
    conversation.end(store=True)
    return held, passes, logits


def passes_until(stop, sizes):
    """The passes of a try that ends behind `stop` tokens: the prompt in pieces, then one by one."""
    return [*pieces(PROMPT[:stop], sizes), *pieces(ANSWER[: max(0, stop - len(PROMPT))], (1,))]


def compare(target, warm, cold):
    """Raises unless both are equal bit for bit.

    The hybrid computes in float32 and adds up in the order of the cells of a pool, which another
    history has filled in another order. Its states are compared bit for bit with the others, in
    per-layer caches.
    """
    if isinstance(target, PoolTarget) and target.kind == "hybrid":
        np.testing.assert_allclose(warm, cold, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(warm, cold)


def test_killed_at_each_token(target):
    whole, hits = PROMPT + ANSWER, []
    for sizes in RECURRENT_SIZES.get(target.kind, SIZES):
        for stop in range(1, len(whole) + 1):
            first = passes_until(stop, sizes)
            # The next turn behind an answer, or the same prompt once more.
            prompt = (*whole[: max(stop, len(PROMPT))], 1)
            with target.trial() as trial:
                killed(trial, first, PROMPT)
                held, passes, logits = retried(trial, prompt, prompt, sizes)
            hits.append(stop - held)
            chunks = (*first_tokens(tuple(first), held), *passes)
            assert joined(chunks) == prompt
            cold = target.cold(chunks)[-len(passes) :]
            for warm_rows, cold_rows in zip(logits, cold, strict=True):
                compare(target, warm_rows, cold_rows)
    # All that was committed is reused, where every position can be resumed at.
    if target.kind == "full":
        assert set(hits) == {0}
    assert min(hits) == 0


def test_every_depth_of_a_hit(target):
    """Prompts that part from an earlier one behind each of its tokens."""
    depths = set()
    sizes = (1,) if target.kind == "hybrid" else (5,)
    for depth in range(1, len(PROMPT) + 1):
        prompt = (*PROMPT[:depth], 33, 34)
        with target.trial() as trial:
            for _ in range(2):  # where they part, a window or state can be resumed at from then on
                killed(trial, pieces(PROMPT, sizes), PROMPT)
                held, passes, logits = retried(trial, prompt, prompt, sizes)
            held, passes, logits = retried(trial, (*prompt[:-1], 35), (*prompt[:-1], 35), sizes)
        depths.add(held)
        first = first_tokens(tuple(pieces((*PROMPT[:depth], 33), sizes)), held)
        cold = target.cold((*first, *passes))[-len(passes) :]
        for warm_rows, cold_rows in zip(logits, cold, strict=True):
            compare(target, warm_rows, cold_rows)
    assert depths == {depth + 1 for depth in range(1, len(PROMPT) + 1)}
