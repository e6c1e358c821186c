"""Events as vLLM's own sources read and name them: `nox -s engines` has them."""

import pytest

from kvcache.prefix import ZmqEventPublisher

msgspec = pytest.importorskip("msgspec")
pytest.importorskip("zmq")

from .random_sessions import RandomSessions  # noqa: E402
from .subscriber import Subscriber  # noqa: E402
from .vllm_sources import Recipe, load  # noqa: E402

pytestmark = pytest.mark.matrix
ANY = "tcp://127.0.0.1:*"
SESSIONS = 10_000


@pytest.fixture(scope="module")
def vllm():
    return load()


@pytest.mark.parametrize(("block_size", "namespace"), [(16, ""), (5, "llama")])
def test_classes_of_vllm_tell_what_is_stored(vllm, block_size, namespace):
    """Half of the sessions each: a router that decodes with these classes, and falls behind."""
    kv_events, hashing, utils = vllm
    recipe, told = Recipe(hashing, utils), []
    sessions = RandomSessions(block_size, block_size, budget=20_000, namespace=namespace)
    sessions.prefix.events.subscribe(told.append)
    with ZmqEventPublisher(sessions.prefix.events, ANY, replay_endpoint=ANY) as publisher:
        router = Subscriber(publisher, kv_events.KVEventBatch)
        for number in range(SESSIONS // 2):
            sessions.run()
            if number % 7 == 0:  # the messages of the others are missed, or late
                router.receive(0)
            if number % 250 == 249:
                router.follow(publisher, len(told))
                assert set(router.blocks) == sessions.stored(recipe.hashes)
        assert publisher.dropped == 0
        router.close()
    assert len(router.events) == len(told)
    kinds = {type(event) for event in router.events}
    assert kinds == {kv_events.BlockStored, kv_events.BlockRemoved, kv_events.AllBlocksCleared}
    for event, ours in zip(router.events, told, strict=True):
        for field in type(ours).__dataclass_fields__:
            assert plain(getattr(event, field)) == plain(getattr(ours, field))


def plain(value):
    """Lists in the place of tuples."""
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def test_extra_keys_of_events_are_those_of_vllm(vllm):
    _, hashing, utils = vllm
    recipe, told = Recipe(hashing, utils), []
    sessions = RandomSessions(3, 4, budget=None)
    sessions.prefix.events.subscribe(told.append)
    for _ in range(300):
        sessions.run()
    by_name = {}
    for asked in sessions.asked:
        options = {"salt": asked.salt, "size": 4, "media": asked.media, "adapter": asked.adapter}
        keys = recipe.extra_keys(asked.ids, **options) or []
        by_name.update(zip(recipe.hashes(asked.ids, **options), keys, strict=True))
    stored = [event for event in told if type(event).__name__ == "BlockStored"]
    for event in stored:
        keys = event.extra_keys or [None] * len(event.block_hashes)
        assert keys == [by_name[name] for name in event.block_hashes]
    assert any(event.extra_keys and event.lora_name for event in stored)
