"""Sessions whose prompts have several images: each token sees the frames of the latest one."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache
from kvcache import Batch, EncoderCache
from kvcache.prefix import PrefixCache

from .served import Pool, Server, check_accounts, check_nothing_left

NUMPY = kvcache.get_backend("numpy")
PLACEHOLDER = 7


def width(image):
    """Placeholder tokens of an image."""
    return image % 2 + 1


def frames(image):
    """Frames that the encoder makes of an image."""
    return image % 3 + 1


def images_in(ids):
    """``{position: image}`` of the first placeholders; text is below 50."""
    images, place = {}, 0
    while place < len(ids):
        if ids[place] >= 50:
            images[place] = ids[place]
        place += width(ids[place]) if ids[place] >= 50 else 1
    return images


def written(parts):
    """The ids of a prompt: an image counts once for each of its placeholders."""
    return [id_ for part in parts for id_ in [part] * (width(part) if part >= 50 else 1)]


class Gallery(Pool):
    """A model whose prompts may have images anywhere. An image comes with its first placeholder."""

    media = True

    def run(self, session, ids, start, stop):
        """Passes of the tokens ``[start, stop)``, with one image at most in each."""
        cuts = [start, *(place for place in images_in(ids) if start < place < stop), stop]
        for first, last in pairwise(cuts):
            self.run_all([(session.sequence, ids, first, last)])

    def brings_image(self, ids, place):
        return place in images_in(ids)

    def _cross_attend(self, requests, arriving):
        self.cache.set_layer_type(0)
        self.cache.set_layer(0)
        if arriving:
            [image] = arriving
            output = self.backend.from_host(np.full((1, frames(image), 1), image, np.float32))
            self.cache.put(output, output)
        [(_, ids, _, stop)] = requests
        visible = [image for place, image in images_in(ids).items() if place < stop]
        assert self.cache.caches[0].encoder_cached is bool(visible)
        if visible:
            found = self.backend.to_host(self.cache.get()[0])[0, :, 0].tolist()
            assert found == [visible[-1]] * frames(visible[-1])


class GalleryServer(Server):
    def begin(self, ids, **options):
        tokens = [PLACEHOLDER if id_ >= 50 else id_ for id_ in ids]
        media = {(p, p + width(image)): f"image {image}" for p, image in images_in(ids).items()}
        session = self.prefix.session(tokens, media=media, **options)
        assert session.remaining.tolist() == tokens[session.matched :]
        return session

    def reusable(self, ids):
        """Tokens of a prompt that are stored, up to the last one or the beginning of an image."""
        length = self.common(ids)
        for place, image in images_in(ids).items():
            if place < length < place + width(image):
                length = place
        return length


PROMPTS = st.lists(st.sampled_from([1, 2, 50, 51, 52, 53]), min_size=1, max_size=7).map(written)
TURN = st.tuples(st.integers(0, 9), st.integers(0, 12), PROMPTS, st.integers(1, 4))


def cut(ids, length):
    """The beginning of a prompt, up to `length` or the beginning of an image there."""
    inside = [p for p, image in images_in(ids).items() if p < length < p + width(image)]
    return ids[: inside[0] if inside else length]


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits", [{}, {"window": 3}, {"chunk": 4}], ids=["full", "window", "chunk"]
)
@settings(max_examples=60)
@given(turns=st.lists(TURN, min_size=2, max_size=8), budget=st.sampled_from([None, None, 0, 400]))
def test_prompts_with_images_anywhere(limits, turns, budget):
    server = GalleryServer(Gallery(NUMPY, limits, capacity=40), budget=budget)
    for base, length, new, size in turns:
        old = server.stored[base % len(server.stored)] if server.stored else []
        ids = cut(old, length) + new
        expected = server.reusable(ids)
        matched = server.ask(ids, [3, 4], sizes=[size])
        assert matched <= expected
        if limits != {"window": 3} and budget is None:
            assert matched == expected
        check_accounts(server)
    check_nothing_left(server)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("limits", [{}, {"window": 3}], ids=["full", "window"])
def test_every_image_of_a_request_is_found_again(backend, count, limits):
    server = GalleryServer(Gallery(backend, limits, capacity=40))
    ids = written([1, 50, 2, 3, 4, 51, 5, 6, 7, 52, 8, 9][: 4 * count])
    points = range(len(ids))
    assert server.ask(ids, resume_points=points) == 0
    for length in range(1, len(ids)):
        question = [*cut(ids, length), 33]
        assert server.ask(question, resume_points=points) == len(question) - 1, length
    check_nothing_left(server)


def test_a_hit_goes_on_from_the_image_in_front_of_it():
    """What later images have replaced is found, whatever the request before went on to."""
    server = GalleryServer(Gallery(NUMPY, {}, capacity=40))
    server.ask(written([50, 1, 2, 3, 51, 4]))
    for _ in range(3):
        assert server.ask(written([50, 1, 2, 33])) == 3
    assert server.ask(written([50, 1, 2, 3, 52, 33])) == 4
    assert server.ask(written([50, 1, 2, 3, 51, 4, 33])) == 7


def test_a_session_that_goes_back_sees_the_image_before():
    server = GalleryServer(Gallery(NUMPY, {}, capacity=40))
    ids = written([50, 1, 52, 2, 3])
    server.ask(ids)
    with server.begin([*ids, 4]) as session:
        assert session.matched == 5
        session.truncate(2)
        server.compute(session, [50, 1, 5, 6], 2)
        session.extend([5, 6])
    server.stored.append([50, 1, 5, 6])
    assert server.ask([50, 1, 5, 6, 33]) == 4
    check_nothing_left(server)


def test_images_of_other_numbers_of_frames_join_where_spans_do():
    """Rows of a window, stored by two sessions in turn, and the frames of both images."""
    server = GalleryServer(Gallery(NUMPY, {"window": 2}, capacity=40))
    ids = written([50, 1, 2, 52, 3, 4, 5])
    server.ask(ids)
    server.ask([*ids[:2], 33])
    assert server.ask(ids, resume_points=[2, 4]) == len(ids) - 1
    [first, *_] = [span for span in server.prefix._index.kept if not span.start]
    joined = first.payload.snapshot
    for span in first.node.children.values():
        with joined.copy() as left, span.value.payload.snapshot.copy() as right:
            merged = left.merge(right)
            assert set(merged.parts[0].rows.positions.tolist()) <= {0, 3}
            merged.close()


def test_an_encoder_alone_keeps_what_a_prefix_cache_needs():
    cache = EncoderCache()
    cache.init("numpy", max_sequences=1)
    prefix = PrefixCache(cache)
    with prefix.session([1, 2, 3, 4], media={(0, 1): "a", (2, 3): "b"}) as session:
        for place in (0, 2):
            cache.start_forward(Batch([place], [session.sequence], [0]))
            cache.put(*(np.full((1, 2 + place, 1), place, np.float32),) * 2)
    with prefix.session([1, 2, 9], media={(0, 1): "a"}) as session:
        assert session.matched == 2
        cache.start_forward(Batch([2], [session.sequence]))
        assert cache.get()[0].ravel().tolist() == [0, 0]
