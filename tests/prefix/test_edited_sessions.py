"""Sessions that do more than append: what they store is what is there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache
import kvcache.functional
from kvcache import CausalCache, KVCache, NotSupportedError, TrimError, WrapperCache
from kvcache.prefix import PrefixCache

from .deep import Deep, DeepHybridLayers, DeepHybridPool, DeepLayers, DeepPool

PROMPT = list(range(10, 20))

pools = pytest.mark.parametrize("limits", [{}, {"window": 4}, {"chunk": 4}], ids=str)


def full():
    return Deep(DeepPool())


# Tokens taken back.


@pools
@pytest.mark.parametrize("named", ["before", "after", "at the end"])
def test_a_rejected_draft_leaves_the_accepted_tokens(limits, named):
    server = Deep(DeepPool(**limits))
    draft, cache = [1, 2, 3], server.model.cache
    with server.begin(PROMPT) as session:
        if named == "before":
            session.extend(draft)
        server.go_on(session, [*PROMPT, *draft], 10)
        if named == "after":
            session.extend(draft)
        cache.remove(session.sequence, 12 if not limits else 13)  # a window may not go back
        accepted = draft[:2] if not limits else draft
        if named == "at the end":
            session.extend(accepted)
        server.go_on(session, [*PROMPT, *accepted, 4], len(PROMPT) + len(accepted))
        session.extend([4])
    length = len(PROMPT) + len(accepted) + 1
    assert server.ask([*PROMPT, *accepted, 4, 5]) == length
    assert server.ask([*PROMPT, *draft, 4, 5]) <= length


def test_a_rewind_into_the_prompt_forgets_what_was_there():
    server = full()
    with server.begin(PROMPT) as session:
        server.model.cache.remove(session.sequence, 4)
        server.go_on(session, [*PROMPT[:4], 1, 2, 3], 4)
        session.extend([1, 2])  # 3 is never named
    assert server.ask([*PROMPT, 5]) == 4
    assert server.ask([*PROMPT[:4], 1, 2, 3, 5]) == 6


def test_a_rewind_into_what_was_restored():
    server = full()
    server.ask(PROMPT)
    with server.prefix.session([*PROMPT, 9]) as session:
        assert session.matched == 10
        session.truncate(4)
        server.go_on(session, [*PROMPT[:4], 1, 2], 4)
        session.extend([1, 2])
    assert server.ask([*PROMPT[:4], 1, 2, 5]) == 6
    assert server.ask([*PROMPT, 5]) == 10


def test_tokens_named_and_not_computed_are_taken_back_by_name():
    server = full()
    with server.begin(PROMPT) as session:
        session.extend([1, 2, 3])
        server.go_on(session, [*PROMPT, 1], 10)
        session.truncate(11)
        session.extend([4])
        server.go_on(session, [*PROMPT, 1, 4], 11)
    assert server.ask([*PROMPT, 1, 4, 5]) == 12
    assert server.ask([*PROMPT, 1, 2, 5]) == 11


def test_a_removal_of_nothing_takes_no_name_back():
    server = full()
    with server.begin(PROMPT) as session:
        session.extend([1, 2])
        server.model.cache.remove(session.sequence, 10)
        server.go_on(session, [*PROMPT, 1, 2], 10)
    assert server.ask([*PROMPT, 1, 2, 5]) == 12


def test_a_window_that_goes_back_too_far_stores_nothing_new():
    server = Deep(DeepPool(window=3))
    with server.begin(PROMPT) as session:
        server.go_on(session, [*PROMPT, 1], 10)  # a pass drops what the one before left behind
        assert not server.model.cache.can_resume(session.sequence, 5)
        session.truncate(5)
        server.go_on(session, [*PROMPT[:5], 1, 2, 3, 4, 5, 6], 5)
        session.extend([1, 2, 3, 4, 5, 6])
    assert server.ask([*PROMPT[:5], 1, 2, 3, 4, 5, 6, 7]) <= 5


def test_a_sequence_that_begins_again_is_stored_from_its_beginning():
    server, other = full(), [30, 31, 32]
    with server.begin(PROMPT) as session:
        server.model.cache.remove(session.sequence, 2, 5)  # and what it shifted is gone as well
        session.truncate(0)
        server.go_on(session, other, 0)
        session.extend(other)
    assert server.ask([*other, 33]) == 3
    assert server.ask([*PROMPT, 33]) == 0


# Other changes.


@pools
def test_behind_a_context_shift_nothing_is_stored(limits):
    server = Deep(DeepPool(**limits))
    with server.begin(PROMPT) as session:
        server.model.cache.remove(session.sequence, 7, 8)
        left = [*PROMPT[:7], *PROMPT[8:]]
        server.go_on(session, [*left, 1, 2], 9)
        session.extend([1, 2])
    assert server.ask([*PROMPT, 1]) <= 7
    assert server.ask([*left, 1, 2, 3]) <= 7
    with server.begin(PROMPT) as session:  # what was moved goes, and the tokens before it stay
        server.model.cache.remove(session.sequence, 8, 9)
        session.truncate(6)
        server.go_on(session, [*PROMPT[:6], 4, 5], 6)
        session.extend([4, 5])
    found = server.ask([*PROMPT[:6], 4, 5, 6])
    assert found == 8 if not limits else found <= 8


def test_a_part_of_a_wrapper_tells_as_well():
    wrapper = WrapperCache(CausalCache(), CausalCache())
    wrapper.init("numpy", max_sequences=1, capacity=40, max_batch=20)
    prefix = PrefixCache(wrapper)

    def run(ids):
        wrapper.start_forward(kvcache.Batch(range(len(ids)), [0] * len(ids)))
        for kind in (0, 1):
            wrapper.set_layer_type(kind)
            wrapper.set_layer(0)
            keys = np.array(ids, np.float32)[None, :, None]
            wrapper.put(keys, keys)

    with prefix.session(PROMPT):
        run(PROMPT)
        wrapper.caches[1].remove(0, 6)
    with prefix.session([*PROMPT, 1]) as session:
        assert session.matched == 6


def test_a_copy_of_another_session_is_known_by_the_tokens_of_that_one():
    server, other = full(), [30, 31, 32, 33]
    one, two, third = server.begin(PROMPT), server.begin(other), server.begin(PROMPT, salt="x")
    copy = server.model.cache.copy_prefix
    copy(one.sequence, two.sequence, 8)
    copy(one.sequence, third.sequence, 8)
    for session in (two, third):
        server.go_on(session, [*PROMPT[:8], 1, 2], 8)
        session.extend([1, 2])
        session.close()
    one.close(store=False)
    assert server.ask([*PROMPT[:8], 1, 2, 3]) == 10
    assert server.ask([*other, 3]) == 0
    assert server.ask([*PROMPT[:8], 1, 2, 3], salt="x") == 0, "what is of one tenant is of no other"


@pytest.mark.parametrize("length", [12, 11, 10])
def test_a_copy_takes_over_no_names_of_tokens_that_were_not_computed(length):
    """Beams: each names the token that it samples, and computes it later."""
    server = full()
    one, two = server.begin(PROMPT), server.begin([30, 31])
    one.extend([1, 2])
    server.model.cache.copy_prefix(one.sequence, two.sequence, length)
    server.go_on(two, [*PROMPT, 7], len(PROMPT))
    two.extend([7])
    two.close()
    assert server.ask([*PROMPT, 1, 9]) == len(PROMPT)
    assert server.ask([*PROMPT, 7, 9]) == len(PROMPT) + 1
    server.go_on(one, [*PROMPT, 1], len(PROMPT))  # names of the source stay
    one.close()
    assert server.ask([*PROMPT, 1, 9]) == len(PROMPT) + 1


def test_what_comes_from_elsewhere_is_not_known():
    server = Deep(DeepPool(), sequences=[0, 1])
    cache = server.model.cache
    server.model.run(2, [30, 31, 32], 0)  # by hand
    with server.begin(PROMPT) as session, cache.snapshot(2) as snapshot:
        cache.copy_prefix(2, session.sequence, 3)
        server.go_on(session, [30, 31, 32, 1], 3)
        session.extend([1])
    with server.begin(PROMPT) as session, cache.snapshot(2) as snapshot:
        cache.remove(session.sequence, 0)
        cache.restore(session.sequence, snapshot)
        server.go_on(session, [30, 31, 32, 1], 3)
        session.extend([1])
    assert server.prefix.stats.spans == 0


def test_tokens_that_see_others_ahead_are_stored_as_a_whole_medium():
    server, image = full(), {(2, 5): "image"}
    run = server.model.run

    def ask(group, **options):
        with server.prefix.session(PROMPT, **options) as session:
            ahead = [[place - session.matched for place in group]]
            run(session.sequence, PROMPT, session.matched, ahead=ahead)
        with server.prefix.session([*PROMPT, 1], **options) as session:
            return session.matched

    assert ask([2, 3, 4], media=image) == 10
    assert ask([2, 3, 4]) == 2, "of no medium, so that a hit could end among them"
    assert ask([1, 2, 3, 4], media=image, salt="wider") == 1
    for tokens, found in (([9], 10), ([4], 4)):  # they see all of the pass
        salt = str(tokens)
        with server.prefix.session(PROMPT, salt=salt) as session:
            run(session.sequence, PROMPT, 0, ahead=tokens)
        with server.prefix.session([*PROMPT, 1], salt=salt) as session:
            assert session.matched == found


def test_a_position_left_out_is_not_stored_over():
    server = full()
    with server.prefix.session(PROMPT) as session:
        for place in (0, 1, 3):
            server.model.cache.start_forward(kvcache.Batch([place], [session.sequence]))
            for layer in (0, 1):
                server.model.cache.set_layer(layer)
                server.model.cache.put(*(np.ones((1, 1, 2), np.float32),) * 2)
    assert server.prefix.stats.spans == 0


def test_behind_aborted_plans_that_took_the_window_nothing_is_stored():
    server = Deep(DeepPool(max_sequences=1, max_batch=4, window=3))
    cache, ids, new = server.model.cache, PROMPT[:8], [5, 6, 7, 8]
    with server.prefix.session(ids[:4]) as session:  # whose window at its end is kept, so go on
        for stop in (4, 8):
            server.go_on(session, ids[:stop], stop - 4)
        session.extend(ids[4:])
        cache.plan_steps(kvcache.Batch([8], [session.sequence]), cache.cells)
        cache.abort()
        assert cache.next_position(session.sequence) == 8
        assert not cache.can_resume(session.sequence, 8)
        for count in range(1, 5):  # far enough for the window to be whole again
            server.go_on(session, [*ids, *new[:count]], 7 + count)
        session.extend(new)
        assert cache.can_resume(session.sequence, 12)
    with server.prefix.session([*ids, *new, 9]) as session:
        assert session.matched <= 8


def test_a_token_inserted_before_others_was_not_seen_by_them():
    server = full()
    with server.prefix.session(PROMPT) as session:
        for places in ([0, 1, 3, 5, 6], [2, 4], [7, 8, 9]):
            server.model.cache.start_forward(
                kvcache.Batch(places, [session.sequence] * len(places))
            )
            for layer in (0, 1):
                server.model.cache.set_layer(layer)
                server.model.cache.put(*(np.ones((1, len(places), 2), np.float32),) * 2)
    with server.prefix.session([*PROMPT, 1]) as session:
        assert session.matched == 2


# Per-layer caches.


def test_a_draft_rolled_back_in_per_layer_caches():
    for model in (DeepLayers(), DeepLayers(max_size=6)):
        server = Deep(model)
        with server.begin(PROMPT) as session:
            session.caches.checkpoint()
            session.extend([1, 2, 3])
            server.go_on(session, [*PROMPT, 1, 2, 3], 10)
            session.caches.rollback(1)
            server.go_on(session, [*PROMPT, 1, 4], 11)
            session.extend([4])
        assert server.ask([*PROMPT, 1, 4, 5]) == 12
        assert server.ask([*PROMPT, 1, 2, 5]) <= 11


def test_per_layer_caches_that_go_back_in_one_layer_begin_again_or_are_restored():
    server, other = Deep(DeepLayers()), [30, 31, 32]
    with server.begin(PROMPT) as session:
        session.caches[1].trim(4)  # an interrupted pass, say
    assert server.ask([*PROMPT, 1]) == 6
    with server.begin(PROMPT) as session:
        session.caches.reset()
        server.go_on(session, other, 0)
        session.extend(other)
    assert server.ask([*other, 1]) == 3
    with server.begin(PROMPT) as session, session.caches.snapshot(0, 5) as snapshot:
        session.caches.reset()
        session.caches.restore(snapshot)
        server.go_on(session, [*PROMPT[:5], 7], 5)
        session.extend([7])
    assert server.ask([*PROMPT[:5], 7, 8]) == 5


@pytest.mark.parametrize("name", ["per-layer", "ring", "hybrid", "hybrid with a ring"])
def test_a_session_whose_rows_were_selected_stores_nothing(name):
    """Not even where one row is left in the end: whose tokens it has is not known."""
    server = Deep(MODELS[name]())
    for rows in ([[0, 0]], [[0, 0], [1]]):
        with server.begin(PROMPT) as session:
            for selected in rows:
                session.caches.select(selected)
        assert server.prefix.stats.spans == 0
    with server.begin(PROMPT) as session:
        session.caches.select([0])  # which leaves everything as it is
    assert server.ask([*PROMPT, 1]) == 10


def test_a_state_that_comes_back_shorter():
    server = Deep(DeepLayers())
    with server.begin(PROMPT) as session:
        for cache in session.caches:
            cache.import_state(kvcache.functional.trim(cache.export_state(4), 3))
        server.go_on(session, [*PROMPT[:7], 1], 7)
        session.extend([1])
    assert server.ask([*PROMPT[:7], 1, 2]) == 8


def test_a_ring_that_cannot_go_back_keeps_its_tokens_named():
    server = Deep(DeepLayers(max_size=6))
    with server.begin(PROMPT) as session:
        with pytest.raises(TrimError, match="cannot trim"):
            session.truncate(4)
        with pytest.raises(ValueError, match="length must be 0 to"):
            session.truncate(-1)
    assert server.ask([*PROMPT, 1]) == 10


def test_a_trim_that_fails_in_one_layer_forgets_nothing(monkeypatch):
    server = Deep(DeepLayers())
    with server.begin(PROMPT) as session, monkeypatch.context() as patch:
        patch.setattr(type(session.caches[1]), "_rewind", failing_second(KVCache._rewind))
        with pytest.raises(MemoryError):
            session.caches.trim(3)
    assert server.ask([*PROMPT, 1]) == 10


def failing_second(method):
    """The method, which fails when it is called for the second time."""
    calls = []

    def called(self, *arguments):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        return method(self, *arguments)

    return called


# Whatever comes.

AHEAD = 90  # a token that is named, and never computed
STEP = st.one_of(
    st.tuples(st.just("compute"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("back"), st.integers(1, 6), st.booleans()),
    st.tuples(st.just("middle"), st.integers(0, 12), st.integers(1, 4)),
    st.tuples(st.just("leave unfinished"), st.integers(1, 3), st.none()),
    st.tuples(st.just("copy"), st.integers(1, 12), st.integers(0, 2)),
    st.tuples(st.just("roll back"), st.integers(1, 4), st.integers(0, 4)),
    st.tuples(st.just("refill"), st.integers(1, 12), st.none()),
)

TALK = st.tuples(st.integers(1, 12), st.lists(STEP, max_size=6))


class Edited:
    """A session under change, and the ids that it holds by now."""

    def __init__(self, server, prompt, number):
        self.server, self.model, self.ids = server, server.model, list(prompt)
        self.session, self.number = server.begin(prompt), number
        self.other, self.copied = None, []

    @property
    def pool(self):
        return isinstance(self.model, DeepPool)

    @property
    def recurrent(self):
        return isinstance(self.model, DeepHybridPool)

    def new(self, count):
        self.number += count
        return [100 + (self.number + i) % 3 for i in range(count)]

    def step(self, name, one, two):
        getattr(self, "_" + name.replace(" ", "_"))(one, two)

    def _compute(self, count, named_first):
        new, start = self.new(count), len(self.ids)
        self.ids += new
        if named_first:
            self.session.extend(new)
        self.server.go_on(self.session, self.ids, start)
        if not named_first:
            self.session.extend(np.array(new, np.int32))

    def _back(self, count, by_session):
        length = max(0, len(self.ids) - count)
        if not self.pool and not self.session.caches.can_trim(len(self.ids) - length):
            return
        if self.recurrent and not self.model.cache.can_resume(self.session.sequence, length):
            return
        if by_session:
            self.session.truncate(length)
        elif self.pool:
            self.model.cache.remove(self.session.sequence, length)
        else:
            self.session.caches.trim(len(self.ids) - length)
        del self.ids[length:]

    def _middle(self, start, count):
        if self.pool and start + count < len(self.ids):
            try:
                self.model.cache.remove(self.session.sequence, start, start + count)
            except (kvcache.SharedCellsError, NotSupportedError):
                return
            del self.ids[start : start + count]

    def _leave_unfinished(self, count, _):
        if self.pool:
            ids = [*self.ids, *range(count)]
            self.model.run(self.session.sequence, ids, len(self.ids), layers=1)

    def _copy(self, length, ahead):
        """Copy the other session, in which some tokens more are named than computed."""
        if self.pool and self.other is not None:
            self.other.session.extend([AHEAD] * ahead)
            source, target = self.other.session.sequence, self.session.sequence
            if self.recurrent and not self.model.cache.can_resume(source, length):
                length = len(self.other.ids)
            self.model.cache.copy_prefix(source, target, length)
            self.ids = self.other.ids[:length]
            self.copied.append(list(self.ids))

    def _roll_back(self, count, accepted):
        if not self.pool:
            length = len(self.ids) + min(count, accepted)
            self.session.caches.checkpoint()
            self._compute(count, named_first=True)
            self.session.caches.rollback(min(count, accepted))
            del self.ids[length:]

    def _refill(self, length, _):
        if not self.pool and self.model.max_size is None and self.ids:
            held = len(self.ids)
            length = length if self.session.caches.can_trim(held - length) else held
            with self.session.caches.snapshot(0, length) as snapshot:
                self.session.caches.reset()
                self.session.caches.restore(snapshot)
            del self.ids[length:]


MODELS = {
    "full": DeepPool,
    "window": lambda: DeepPool(window=4),
    "memory": lambda: DeepPool(window=3, memory=6),
    "chunk": lambda: DeepPool(chunk=4),
    "per-layer": DeepLayers,
    "ring": lambda: DeepLayers(max_size=6),
    "hybrid": DeepHybridLayers,
    "hybrid with a ring": lambda: DeepHybridLayers(max_size=6),
    "hybrid pool": DeepHybridPool,
    "hybrid pool with a window": lambda: DeepHybridPool(window=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=30)
@given(
    talks=st.lists(
        st.tuples(st.integers(1, 12), st.lists(STEP, max_size=6)), min_size=1, max_size=3
    )
)
def test_whatever_a_session_does_others_compute_what_a_cold_run_does(name, talks):
    server = Deep(MODELS[name]())
    for number, (length, steps) in enumerate(talks):
        edited = Edited(server, (PROMPT + PROMPT)[:length], number)
        edited.other = Edited(server, [100, 101, *PROMPT[:length]], number)
        for step in steps:
            edited.step(*step)
        ends = edited.ids, edited.other.ids
        edited.session.close()
        edited.other.session.close()
        for ids in ends:
            for stop in {1, len(ids) // 2, len(ids)}:
                server.ask([*ids[:stop], 100])
                server.ask([*ids[:stop], 7])
        for ids in edited.copied:
            server.ask([*ids, AHEAD, AHEAD])
