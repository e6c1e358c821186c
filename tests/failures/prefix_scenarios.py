"""Scenarios of prefix caches: sessions that begin and end over a pool, or over per-layer caches."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from kvcache import CausalCache, KVCache, RotatingKVCache
from kvcache.prefix import PrefixCache

from .. import peek
from .observation import attempt, look_at_layers, look_at_pool
from .pool_world import PoolWorld
from .scenario import Act, Scenario, World

PROMPT = [11, 12, 13, 14, 15, 16, 17]
FORKED = [11, 12, 13, 14, 25, 26]
OTHER = [31, 32, 33, 34]
ANSWER = [41, 42]
# The place of rows, and the number of spans that hold them: a session that fails may have split
# one, whose rows are then those of two.
NOT_CONTENT = ("resident", "spans", "evictions", "index_nbytes")


class PrefixWorld(World):
    """A prefix cache, and the sessions that are open. session: the one under test."""

    def __init__(self, place, budget=None):
        super().__init__(place)
        self.now = 0.0
        self.session = None
        self.prefix = PrefixCache(self.made(), budget=budget, clock=lambda: self.now)

    def lose(self):
        """End the session that began: an interrupted call does so itself."""
        _fail(self)
        self.session = None

    def made(self):
        """Return what the prefix cache is over."""
        raise NotImplementedError

    def compute(self, session, tokens, start):
        """Run a model on tokens of a session, the first at position `start`."""
        raise NotImplementedError

    def ask(self, prompt, answer=ANSWER):
        """Serve a whole request; return the tokens that were found stored."""
        with self.prefix.session(prompt) as session:
            self.answer(session, answer)
        return session.matched

    def answer(self, session, answer=ANSWER):
        """Run a model on the rest of the prompt and on its answer."""
        self.now += 1.0
        start = session.matched
        self.compute(session, session.remaining.tolist(), start)
        if answer:
            self.compute(session, answer, start + session.remaining.size)
            session.extend(answer)

    def look_at_caches(self):
        return {
            "stats": {
                name: value
                for name, value in asdict(self.prefix.stats).items()
                if name not in NOT_CONTENT
            },
            "session": attempt(lambda: self.session and self.session.matched),
            **self.look_at_source(),
        }

    def look_at_source(self):
        """Observe what the prefix cache is over."""
        raise NotImplementedError


class PoolPrefixWorld(PrefixWorld):
    """Sessions over a pool."""

    window = None

    def made(self):
        self.pool = PoolWorld(self.place, CausalCache(window=self.window), capacity=12)
        self.pool._stamps = self._stamps
        return self.pool.initialised().cache

    def compute(self, session, tokens, start):
        self.pool.run({session.sequence: range(start, start + len(tokens))})

    def look_at_source(self):
        return look_at_pool(self.pool.cache)

    def left(self):
        """Count the cells in use."""
        return self.pool.cache.cells - peek.table(self.pool.cache).free


class WindowPrefixWorld(PoolPrefixWorld):
    """Sessions over a pool with a sliding window."""

    window = 3


class LayerPrefixWorld(PrefixWorld):
    """Sessions over per-layer caches."""

    def made(self):
        return [
            KVCache(self.backend, step=8),
            RotatingKVCache(4, backend=self.backend, step=4),
        ]

    def compute(self, session, tokens, start):
        keys = np.array(self.stamps(len(tokens)), np.float32)[None, None, :, None]
        array = self.array(keys)
        for cache in session.caches:
            cache.update(array, array)

    def look_at_source(self):
        if self.session is None:
            return {}
        return {"caches": attempt(lambda: look_at_layers(self.session.caches))}

    def left(self):
        return 0


# Later calls.


def goes_on(world):
    """End the session under test, ask again, and give everything back."""
    session = world.session
    seen = {
        "ended": attempt(_end, world, session) if session is not None else None,
        "answers": [attempt(world.ask, prompt) for prompt in (PROMPT, FORKED, OTHER, PROMPT)],
        "state": world.look(),
    }
    for other in vars(world).get("others", []):
        attempt(other.__exit__, None, None, None)
    seen["cleared"] = [attempt(world.prefix.clear), world.look(), world.left()]
    return seen


def _end(world, session):
    if world.session_is_computed:
        return session.__exit__(None, None, None)
    world.answer(session)
    return session.__exit__(None, None, None)


# States and acts.


def _state(kind, stored, budget=None):
    """Return a state with stored answers to prompts."""

    def build(place):
        world = kind(place, budget)
        world.session_is_computed = False
        for prompt in stored:
            world.ask(prompt)
        world.now += 1.0
        return world

    return build


def _crowded(kind):
    """Return a state in which a session needs the cells of stored prompts."""

    def build(place):
        world = _state(kind, [PROMPT, OTHER, [51, 52, 53, 54, 55, 56, 57]])(place)
        world.others = [world.prefix.session([*OTHER, 61])]
        world.answer(world.others[0], [62, 63, 64])
        return world

    return build


def _begin(prompt):
    def run(world):
        world.session = world.prefix.session(prompt, resume_points=[3])

    return run


def _computed(prompt, **options):
    """Return a preparation of a session that is ready to end."""

    def prepare(world):
        world.session = world.prefix.session(prompt, **options)
        world.answer(world.session)
        world.session_is_computed = True

    return prepare


def _exit(world):
    world.session.__exit__(None, None, None)


def _fail(world):
    """Leave the session by an exception, which hides that its end failed."""
    world.session.__exit__(ValueError, ValueError("the model"), None)


def _drop(world):
    world.session.close(store=False)


BEGINS = [
    Act("begin anew", _begin([71, 72, 73]), resource=True),
    Act("begin again", _begin(PROMPT), resource=True),
    Act("begin forked", _begin(FORKED), resource=True),
]
ENDS = [
    Act("end new", _exit, instead=_drop, prepare=_computed([71, 72, 73])),
    Act("end forked", _exit, instead=_drop, prepare=_computed(FORKED)),
    Act("end again", _exit, instead=_drop, prepare=_computed(PROMPT)),
    Act("end failed", _fail, instead=_drop, prepare=_computed(FORKED)),
]
CLEAR = Act("clear", lambda world: world.prefix.clear())
EXTEND = Act("extend", lambda world: world.session.extend([81]), _computed(PROMPT), silent=True)
TRUNCATE = Act("truncate", lambda world: world.session.truncate(5), _computed(PROMPT))
SCHEDULE = Act(
    "schedule", lambda world: world.session.schedule([12]), _computed(FORKED), silent=True
)

RETAINED = Act(
    "end retained", _exit, instead=_drop, prepare=_computed(FORKED, retain={(2, None): (5, 60.0)})
)
BRANCH = Act("drop branch", lambda world: world.prefix.drop_branch([*PROMPT, *ANSWER], 4))

STATES = {
    "pool": _state(PoolPrefixWorld, [PROMPT]),
    "small pool": _crowded(PoolPrefixWorld),
    "window": _state(WindowPrefixWorld, [PROMPT]),
    "layers": _state(LayerPrefixWorld, [PROMPT]),
    "budget": _state(PoolPrefixWorld, [PROMPT], budget=200),
}
ACTS = {
    "pool": [*BEGINS, *ENDS, RETAINED, CLEAR, BRANCH, EXTEND, TRUNCATE],
    "small pool": [BEGINS[1], ENDS[0]],
    "window": [*BEGINS, *ENDS, SCHEDULE, TRUNCATE],
    "layers": [*BEGINS, *ENDS, RETAINED, CLEAR, EXTEND],
    "budget": ENDS[:2],
}
SCENARIOS = [
    Scenario(f"prefix over {state}", STATES[state], act, (goes_on,))
    for state, acts in ACTS.items()
    for act in acts
]
