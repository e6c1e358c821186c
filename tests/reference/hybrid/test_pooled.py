"""The hybrid over one cache of many sequences: as over the caches of its layers."""

import numpy as np
import pytest

import kvcache
from kvcache.errors import BoundsError, CacheFullError, TrimError
from kvcache.reference.decoder import PassPart
from kvcache.reference.errors import UnsupportedModelError
from kvcache.reference.generate import generate
from kvcache.reference.server import Server

from .conftest import load

RNG = np.random.default_rng(7)
SAID = [RNG.integers(0, 64, 90).tolist() for _ in range(4)]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
# By pass, the tokens of each sequence, in the order of the batch. Where every length is compiled by
# itself, the first ones have few.
PASSES = [
    {0: 8, 1: 1},  # a step among fresh ones
    {2: 8, 1: 1},
    {0: 1, 1: 1},  # steps alone
    {1: 8, 0: 1},
]
LONG = [{0: 1, 2: 1, 1: 1}, {3: 66, 0: 1}, {3: 3, 2: 7, 1: 2}]


@pytest.fixture(scope="module")
def tiny_numpy(tiny_path):
    return load(tiny_path, kvcache.get_backend("numpy"))


def parts_of(cache, counts, last=True, said=SAID):
    """The next tokens of some sequences."""
    starts = {sequence: cache.next_position(sequence) for sequence in counts}
    return [
        PassPart(s, starts[s], said[s][starts[s] : starts[s] + n], last) for s, n in counts.items()
    ]


def logits(forward, parts):
    """Logits of every token, by sequence and position."""
    rows = iter(forward.backend.to_host(forward.logits(parts, last_only=False)))
    return {(p.sequence, p.start + i): next(rows) for p in parts for i in range(len(p.ids))}


def expected_of(model, sequence, length, said=SAID):
    """Logits of every token of a sequence on NumPy, through the caches of its layers."""
    return model([said[sequence][:length]], model.make_caches(), last_only=False)[0]


def check(model, found, said=SAID):
    """Logits by sequence and position are those through the caches of the layers."""
    for sequence in {sequence for sequence, _ in found}:
        positions = [p for s, p in found if s == sequence]
        expected = expected_of(model, sequence, max(positions) + 1, said)
        ours = np.stack([found[sequence, position] for position in positions])
        np.testing.assert_allclose(ours, expected[positions], **CLOSE)


def test_many_sequences_in_a_pass(tiny, tiny_numpy):
    forward, found = tiny.make_pass(4, 96, 96), {}
    for counts in PASSES + (LONG if forward.any_length else []):
        found |= logits(forward, parts_of(forward.cache, counts))
    check(tiny_numpy, found)
    lengths = [forward.cache.next_position(sequence) for sequence in range(4)]
    assert lengths == ([12, 14, 16, 69] if forward.any_length else [10, 11, 8, 0])


def test_states_at_cuts(tiny, tiny_numpy):
    forward = tiny.make_pass(3, 96, 96)
    cache = forward.cache
    cache.schedule(0, [3, 7])
    logits(forward, parts_of(cache, {0: 8, 1: 1}))
    assert [p for p in range(1, 9) if cache.can_resume(0, p)] == [3, 7, 8]
    cache.copy_prefix(0, 2, 7)
    said = [*SAID[:2], SAID[0][:7] + SAID[3]]
    cache.remove(0, 3)
    found = logits(forward, parts_of(cache, {0: 8, 2: 1}, said=said))
    check(tiny_numpy, found, said)


def test_states_at_cuts_of_several(tiny_numpy):
    """Off the grid of pieces, on it, and beside sequences without any."""
    forward = tiny_numpy.make_pass(4, 96, 96)
    cache = forward.cache
    cache.schedule(0, [5, 64, 69])
    cache.schedule(1, [5])
    logits(forward, parts_of(cache, {0: 74, 2: 1, 1: 10}))
    assert [p for p in range(1, 75) if cache.can_resume(0, p)] == [5, 64, 69, 74]
    assert [p for p in range(1, 11) if cache.can_resume(1, p)] == [5, 10]
    cache.copy_prefix(0, 3, 69)
    said = [*SAID[:3], SAID[0][:69] + SAID[3]]
    cache.remove(0, 5)
    with pytest.raises(TrimError, match="only to positions with a state"):
        cache.remove(3, 68)
    found = logits(forward, parts_of(cache, {3: 5, 0: 5, 1: 1}, said=said))
    check(tiny_numpy, found, said)


def test_next_tokens(tiny_numpy):
    """Those of the parts that ask for one, in the order given."""
    forward = tiny_numpy.make_pass(3, 96, 96)
    parts = parts_of(forward.cache, {0: 12, 1: 1, 2: 9})
    parts[2] = parts[2]._replace(last=False)
    expected = [int(expected_of(tiny_numpy, s, n)[-1].argmax()) for s, n in ((0, 12), (1, 1))]
    assert forward(parts) == expected
    assert forward(parts_of(forward.cache, {2: 3}, last=False)) == []


@pytest.mark.parametrize("recurrent", [(0, 1, 2, 3), (), (1,)], ids=str)
def test_layers_of_one_kind(write_checkpoint, recurrent):
    model = load(write_checkpoint(recurrent=recurrent), kvcache.get_backend("numpy"))
    forward, found = model.make_pass(4, 96, 96), {}
    assert len(forward.cache.caches) == (2 if recurrent == (1,) else 1)
    for counts in PASSES + LONG:
        found |= logits(forward, parts_of(forward.cache, counts))
    check(model, found)


def test_keys_and_values_of_half_precision(tiny, tiny_numpy):
    forward = tiny.make_pass(2, 96, 96, dtype="bfloat16")
    found = logits(forward, parts_of(forward.cache, {0: 8, 1: 1}))
    found |= logits(forward, parts_of(forward.cache, {0: 1, 1: 1}))
    for sequence, length in ((0, 9), (1, 2)):
        ours = [found[sequence, position] for position in range(length)]
        expected = expected_of(tiny_numpy, sequence, length)
        np.testing.assert_allclose(np.stack(ours), expected, rtol=0.1, atol=0.3)


def test_a_window_of_attention_layers(tiny_numpy):
    forward = tiny_numpy.make_pass(1, 96, 96, window=5)
    found = logits(forward, parts_of(forward.cache, {0: 30}))
    caches = tiny_numpy.make_caches("rotating", max_size=5)
    expected = [tiny_numpy([[token]], caches)[0] for token in SAID[0][:30]]
    np.testing.assert_allclose(np.stack([found[0, p] for p in range(30)]), expected, **CLOSE)


def test_what_is_refused_changes_nothing(tiny_numpy):
    forward = tiny_numpy.make_pass(2, 20, 20)
    forward(parts_of(forward.cache, {0: 15}))
    with pytest.raises(CacheFullError):
        forward(parts_of(forward.cache, {0: 1, 1: 40}))
    with pytest.raises(BoundsError, match="got 64 to 64"):
        forward([PassPart(0, 15, [64], last=True)])
    check(tiny_numpy, logits(forward, parts_of(forward.cache, {0: 3})))
    with pytest.raises(UnsupportedModelError, match="a state cannot forget them"):
        tiny_numpy.make_pass(2, 20, 20, context_shift=True)


@pytest.mark.parametrize("layer", range(4))
def test_a_pass_that_fails_is_not_history(tiny_numpy, layer, monkeypatch):
    forward = tiny_numpy.make_pass(2, 40, 40)
    forward.cache.schedule(0, [5, 12])
    forward(parts_of(forward.cache, {0: 8}))
    mlp, calls = tiny_numpy.stages.mlp, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == layer + 1:
            raise MemoryError
        return mlp(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_numpy.stages, "mlp", failing)
        with pytest.raises(MemoryError):
            forward(parts_of(forward.cache, {0: 10, 1: 3}))
    if layer < 3:  # behind the last one, the pass was complete
        assert [forward.cache.next_position(sequence) for sequence in range(2)] == [8, 0]
        check(tiny_numpy, logits(forward, parts_of(forward.cache, {0: 10, 1: 3})))
    assert [p for p in range(1, 19) if forward.cache.can_resume(0, p)] == [5, 12, 18]


def test_memory(tiny_numpy):
    forward = tiny_numpy.make_pass(2, 16, 16)
    forward(parts_of(forward.cache, {0: 3}))
    states = forward.cache.caches[1]
    # Two layers with keys and values of two heads of 16 dimensions, in float32.
    assert forward.nbytes == 2 * 2 * forward.cells * 2 * 16 * 4 + states.nbytes
    assert states.nbytes > 0


def test_continuous_batching(tiny, tiny_numpy):
    """Prompts join and leave; the pool is too small for all of them, so the newest waits."""
    if not tiny.backend.slices_are_views:
        pytest.skip("every length is compiled by itself; that takes long, and shows no more")
    prompts = [said[:n] for said, n in zip(SAID, (3, 11, 1, 17), strict=True)]
    server = Server(tiny, 3, 40, cells=60, max_batch=8, keep=0)
    requests = [server.submit(prompt, 12) for prompt in prompts]
    for _ in server.run():
        pass
    for request, prompt in zip(requests, prompts, strict=True):
        alone = list(generate(tiny_numpy, prompt, tiny_numpy.make_caches(), 12))
        assert request.generated == alone
        assert request.finish == "max tokens"
