"""The first pass of a pool, cut short: nothing tells how many layers a model has."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache import Batch, CausalCache, EncoderCache, KVCacheError, RecurrentCache, WrapperCache
from kvcache.prefix import PrefixCache

from .. import peek
from .oracle import check_table

PROMPT = [10, 11, 12]


class Model:
    """Two layers over the parts of a pool; the data of each say token and layer."""

    def __init__(self, *parts, layers=((0, 0), (0, 1))):
        self.cache = parts[0] if len(parts) == 1 else WrapperCache(*parts)
        self.parts, self.layers = parts, layers
        self.cache.init("numpy", max_sequences=3, capacity=16, max_batch=8)

    def begin(self, sequence, ids, start=0):
        positions = range(start, start + len(ids))
        multimodal = [len(ids) - 1] if self.has(EncoderCache) else []
        self.ids = ids
        self.cache.start_forward(Batch(positions, [sequence] * len(ids), multimodal))

    def has(self, kind):
        return any(isinstance(part, kind) for part in self.parts)

    def put(self, layers):
        """Put some layers; what the last token sees in each."""
        return [self._put(*self.layers[number], number) for number in layers]

    def _put(self, part, layer, number):
        cache, base = self.cache, 100 * number
        if len(self.parts) > 1:
            cache.set_layer_type(part)
        cache.set_layer(layer)
        if isinstance(self.parts[part], RecurrentCache):
            before = cache.get_states()
            seen = [] if before is None else before[0][0].tolist()
            cache.put_states(np.array([[base + self.ids[-1]]], np.float32))
            return [*seen, base + self.ids[-1]]
        keys = np.array(self.ids, np.float32)[None, :, None] + base
        cache.put(keys, keys)
        keys, _, mask = cache.get()
        return keys[0, ... if mask is None else mask[-1], 0].astype(int).tolist()

    def run(self, sequence, ids, start=0):
        self.begin(sequence, ids, start)
        return self.put((0, 1))

    def sees(self, ids):
        """What the last of tokens computed in one pass sees."""
        return [
            self._visible(ids, self.parts[part], 100 * number)
            for number, (part, _) in enumerate(self.layers)
        ]

    @staticmethod
    def _visible(ids, part, base):
        if isinstance(part, RecurrentCache):
            return [base + ids[-1]]
        if isinstance(part, CausalCache):
            first = max(0, len(ids) - (part.window or len(ids)))
            first = max(first, (len(ids) - 1) // part.chunk * part.chunk) if part.chunk else first
            ids = ids[first:]
        return [base + token for token in ids]


KINDS = {
    "causal": lambda: Model(CausalCache()),
    "pages": lambda: Model(CausalCache(page=4)),
    "window": lambda: Model(CausalCache(window=2)),
    "chunk": lambda: Model(CausalCache(chunk=2)),
    "encoder": lambda: Model(EncoderCache()),
    "recurrent": lambda: Model(RecurrentCache()),
    "wrapper": lambda: Model(CausalCache(window=2), CausalCache(), layers=((0, 0), (1, 1))),
    "one part": lambda: Model(CausalCache(window=2), CausalCache(), layers=((1, 0), (1, 1))),
    "hybrid": lambda: Model(RecurrentCache(), CausalCache(), layers=((0, 0), (1, 1))),
    "images": lambda: Model(EncoderCache(), CausalCache(), layers=((1, 0), (0, 1))),
}


@pytest.fixture(params=KINDS)
def model(request):
    return KINDS[request.param]()


def check_whole(model):
    """No trace is left: passes compute what they compute in a new pool, and go on."""
    for sequence in (0, 1):
        assert model.run(sequence, PROMPT) == model.sees(PROMPT)
        assert model.cache.next_position(sequence) == 3
    if not model.has(RecurrentCache) and not model.has(EncoderCache):
        model.begin(0, [13], 3)
        assert model.put((0, 1)) == model.sees([*PROMPT, 13])
    for part in model.parts:
        if isinstance(part, CausalCache):
            check_table(peek.table(part))


@pytest.mark.parametrize("layers", [(), (0,), (0, 1)])
def test_abort_takes_it_back_before_anything_tells_that_it_is_whole(model, layers):
    model.begin(0, PROMPT)
    model.put(layers)
    model.cache.abort()
    assert model.cache.next_position(0) == 0
    with pytest.raises(KVCacheError, match="Call start_forward"):
        model.put((0,))
    check_whole(model)


def test_without_any_layer_nobody_sees_it_and_the_next_pass_takes_it_back(model):
    model.begin(0, PROMPT)
    assert model.cache.next_position(0) == 0
    assert model.cache.is_unfinished()
    model.begin(0, PROMPT)
    assert model.cache.next_position(0) == 0
    check_whole(model)


def test_a_pass_behind_it_tells_that_it_is_whole(model):
    model.run(0, PROMPT)
    model.run(1, PROMPT)
    model.cache.abort()
    assert [model.cache.next_position(sequence) for sequence in (0, 1)] == [3, 3]


def test_passes_of_parts_leave_a_complete_one():
    model = KINDS["wrapper"]()
    model.run(0, PROMPT)
    model.parts[0].start_forward(Batch([0], [1]))
    assert peek.table(model.parts[1]).cells_of(0).size == 3


def test_allocated_layers_are_those_of_the_model():
    model = KINDS["causal"]()
    model.cache.allocate([0, 1], 1, 1)
    model.run(0, PROMPT)
    model.cache.abort()
    assert model.cache.next_position(0) == 3


def test_a_sequence_that_leaves_it_before_any_layer():
    model = KINDS["causal"]()
    model.cache.start_forward(Batch([0, 1, 0], [0, 0, 1]))
    model.cache.remove(0, 0)
    model.ids = [10, 11, 20]
    assert model.put((0,)) == [[20]]
    assert [model.cache.next_position(sequence) for sequence in (0, 1)] == [0, 1]
    with pytest.raises(KVCacheError, match="a pass is over once every layer was put"):
        model.put((1,))
    model.cache.abort()
    assert peek.table(model.cache).free == model.cache.cells
    assert model.run(0, PROMPT) == model.sees(PROMPT)
    check_table(peek.table(model.cache))


@pytest.mark.parametrize("steps", [None, 2])
def test_a_program_has_layers(steps):
    cache = CausalCache()
    cache.init("numpy", max_sequences=1, capacity=8, max_batch=8)
    batch = Batch([0], [0])
    with pytest.raises(KVCacheError, match=r"only the layers allocated before.* Call allocate"):
        cache.plan(batch) if steps is None else cache.plan_steps(batch, steps)
    assert peek.table(cache).free == cache.cells
    cache.allocate([0], 1, 1)
    assert cache.plan(batch).cells.tolist() == [0]


# Sessions.


@pytest.mark.parametrize("end", ["close", "commit", "raise"])
@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("layers", [(), (0,)])
def test_a_session_stores_nothing_of_it_once_it_is_taken_back_or_was_never_put(
    model, layers, aborted, end
):
    if layers and not aborted and end != "raise":
        pytest.skip("counts as complete: see below")
    prefix = PrefixCache(model.cache)
    session = prefix.session(PROMPT)
    model.begin(session.sequence, PROMPT)
    model.put(layers)
    if aborted:
        model.cache.abort()
    finish(session, end)
    with prefix.session([*PROMPT, 13]) as again:
        if model.has(EncoderCache) and not model.has(CausalCache):  # before the output is nothing
            assert again.matched < 3
        else:
            assert again.matched == 0
            assert model.run(again.sequence, [*PROMPT, 13]) == model.sees([*PROMPT, 13])


def finish(session, end):
    if end == "commit":
        session.commit()
    if end == "raise":
        session.__exit__(KeyError, KeyError(), None)
    else:
        session.close()


@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("layers", [(), (0,)])
def test_a_session_tries_again(model, layers, aborted):
    prefix = PrefixCache(model.cache)
    with prefix.session(PROMPT) as session:
        model.begin(session.sequence, PROMPT)
        model.put(layers)
        if layers or aborted:
            model.cache.abort()
        assert model.run(session.sequence, PROMPT) == model.sees(PROMPT)
    assert prefix.lookup([*PROMPT, 13]).matched == 3


@pytest.mark.parametrize("kind", ["causal", "chunk", "window", "recurrent", "wrapper"])
@pytest.mark.parametrize("settle", ["commit", "extend"])
def test_what_a_session_counts_as_complete_stays(kind, settle):
    """Whoever names the next token has seen the whole model; who commits has others see it."""
    model = KINDS[kind]()
    prefix = PrefixCache(model.cache)
    with prefix.session(PROMPT) as session:
        model.run(session.sequence, PROMPT)
        session.commit() if settle == "commit" else session.extend([13])
        model.cache.abort()
        assert model.cache.next_position(session.sequence) == 3
    assert prefix.lookup([*PROMPT, 13]).matched == 3


@pytest.mark.parametrize("kind", ["causal", "chunk", "window", "recurrent", "wrapper"])
@pytest.mark.parametrize("end", ["close", "commit"])
def test_some_layers_of_the_very_first_pass_count_as_all(kind, end):
    """The exception: nothing tells that more were to come. Say so by `abort`, or `allocate`."""
    model = KINDS[kind]()
    prefix = PrefixCache(model.cache)
    session = prefix.session(PROMPT)
    model.begin(session.sequence, PROMPT)
    model.put((0,))
    finish(session, end)
    assert prefix.lookup([*PROMPT, 13]).matched == 3
