"""Conversations by kind: functions of a random generator that return scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from .operations import (
    Begin,
    Cancel,
    Draft,
    End,
    Evict,
    Feed,
    Fork,
    Ids,
    Operation,
    Script,
    Together,
    Trim,
)
from .target import Ability, Target

_FEW = 4
"""Ids of a small alphabet, with which conversations often agree by chance."""


class Draw:
    """Random choices of a script, in sizes that suit `target`."""

    def __init__(self, target: Target, rng: np.random.Generator) -> None:
        self._target, self._rng = target, rng
        self._ids = min(target.vocab_size, _FEW) if rng.random() < 0.5 else target.vocab_size

    @property
    def abilities(self) -> frozenset[Ability]:
        """Abilities of the target."""
        return self._target.abilities

    @property
    def tiers(self) -> tuple[str, ...]:
        """Tiers of the target."""
        return self._target.tiers

    def number(self, low: int, high: int) -> int:
        """Return a number in ``[low, high]``."""
        return int(self._rng.integers(low, max(low, high) + 1))

    def chance(self, probability: float) -> bool:
        """Return True so often."""
        return bool(self._rng.random() < probability)

    def ids(self, count: int) -> Ids:
        """Return so many token ids."""
        return tuple(map(int, self._rng.integers(0, self._ids, count)))

    def length(self) -> int:
        """Return a length for a prompt: any, or one close to an edge of the target."""
        most = max(2, self._target.max_tokens // 3)
        edges = self._target.edges
        if edges and self.chance(0.5):
            edge = edges[self.number(0, len(edges) - 1)] * self.number(1, 2)
            return max(1, min(self._target.max_tokens // 2, edge + self.number(-1, 1)))
        return self.number(1, most)

    def prompt(self) -> Ids:
        """Return a prompt."""
        return self.ids(self.length())

    def turn(self) -> Ids:
        """Return a few tokens that go on."""
        return self.ids(self.number(1, 6))

    def sizes(self) -> Ids:
        """Return sizes of passes: one pass, passes of one, of five, or at random."""
        kinds: list[Ids] = [(), (1,), (5,), tuple(self.number(1, 7) for _ in range(4))]
        return kinds[self.number(0, len(kinds) - 1)]

    def pick(self, items: Iterable[int]) -> int:
        """Return one of `items`."""
        chosen = list(items)
        return chosen[self.number(0, len(chosen) - 1)]


@dataclass(frozen=True)
class Scenario:
    """A kind of conversation. needs: abilities, and a tier, that the target must have."""

    name: str
    meaning: str
    make: Callable[[Draw], list[Operation]]
    needs: frozenset[Ability] = frozenset()
    tier: str | None = None

    def missing(self, target: Target) -> str:
        """Return what `target` lacks for it; empty if nothing."""
        lacks = sorted(ability.value for ability in self.needs - target.abilities)
        if self.tier is not None and self.tier not in target.tiers:
            lacks.append(f"tier {self.tier}")
        return ", ".join(lacks)

    def script(self, target: Target, seed: int, number: int) -> Script:
        """Return the script of this number: the same for the same arguments."""
        key = [seed, number, *self.name.encode()]
        return tuple(self.make(Draw(target, np.random.default_rng(key))))


def _sized(sizes: Callable[[Draw], Ids]) -> Callable[[Draw], list[Operation]]:
    def make(draw: Draw) -> list[Operation]:
        return [Begin(0, draw.prompt(), sizes=sizes(draw)), Feed(0, draw.turn(), sizes(draw))]

    return make


def _edges(draw: Draw) -> list[Operation]:
    """Cross every edge token by token, and in a pass that ends behind it."""
    script: list[Operation] = [Begin(0, draw.prompt(), sizes=draw.sizes())]
    for _ in range(3):
        script += [Feed(0, draw.ids(draw.number(1, 3)), (1,)), Feed(0, draw.ids(draw.length()))]
    return script


def _returns(draw: Draw) -> list[Operation]:
    script: list[Operation] = [Begin(0, draw.prompt(), sizes=draw.sizes())]
    for _ in range(draw.number(2, 4)):
        script += [Feed(0, draw.turn(), draw.sizes()), End(0)]
        script.append(Begin(0, draw.turn(), 0, 1 << 20, sizes=draw.sizes()))
    return script


def _branches(draw: Draw) -> list[Operation]:
    script: list[Operation] = [Begin(0, draw.prompt(), sizes=draw.sizes()), End(0)]
    for slot in range(1, draw.number(3, 5)):
        source, keep = draw.number(0, slot - 1), draw.length()
        script.append(Begin(slot, draw.turn(), source, keep, sizes=draw.sizes()))
        script += [Feed(slot, draw.turn(), draw.sizes())] * draw.chance(0.5)
        script += [End(slot)] * draw.chance(0.7)
    return script


def _edits(draw: Draw) -> list[Operation]:
    """Change a few tokens, and return to what came of it."""
    script: list[Operation] = [Begin(0, draw.prompt() + draw.prompt(), sizes=draw.sizes()), End(0)]
    for _ in range(3):
        # As many tokens as before, mostly: those behind them keep their positions.
        added, at = draw.ids(draw.number(1, 2)), draw.number(0, draw.length())
        removed = len(added) if draw.chance(0.7) else draw.number(0, 2)
        script += [Begin(0, added, 0, at, at + removed, draw.sizes()), End(0)]
        script += [Begin(0, draw.turn(), 0, 1 << 20), End(0)] * draw.chance(0.7)
    return script


def _truncations(draw: Draw) -> list[Operation]:
    script: list[Operation] = [
        Begin(0, draw.prompt(), sizes=draw.sizes()),
        Feed(0, draw.turn(), draw.sizes()),
        End(0),
    ]
    for slot in range(1, 4):
        script += [Begin(slot, (), 0, draw.length(), sizes=draw.sizes())]
        script += [Feed(slot, draw.turn(), draw.sizes()), End(slot)]
    return [*script, Begin(0, (), 0, 1 << 20)]


def _forks(draw: Draw) -> list[Operation]:
    script: list[Operation] = [Begin(0, draw.prompt(), sizes=draw.sizes())]
    for slot in range(1, draw.number(2, 4)):
        script += [Fork(draw.number(0, slot - 1), slot)]
        order = range(slot + 1) if draw.chance(0.5) else reversed(range(slot + 1))
        script += [Feed(each, draw.turn(), draw.sizes()) for each in order]
    return script


def _trims(draw: Draw) -> list[Operation]:
    script: list[Operation] = [Begin(0, draw.prompt(), sizes=draw.sizes())]
    for _ in range(4):
        script += [Trim(0, draw.number(1, 5)), Feed(0, draw.turn(), draw.sizes())]
    return script


def _drafts(draw: Draw) -> list[Operation]:
    script: list[Operation] = [Begin(0, draw.prompt(), sizes=draw.sizes())]
    for _ in range(draw.number(3, 6)):
        count = draw.number(1, 5)
        script += [Draft(0, draw.ids(count), draw.number(0, count)), Feed(0, draw.ids(1))]
    return script


def _cancels(draw: Draw) -> list[Operation]:
    script: list[Operation] = [Begin(0, draw.prompt(), sizes=draw.sizes())]
    for _ in range(3):
        script += [Cancel(0, draw.turn(), draw.number(0, 2)), Feed(0, draw.turn(), draw.sizes())]
    if Ability.REUSE in draw.abilities:
        script += [End(0), Begin(1, draw.turn(), 0, draw.length())]
    return script


def _batches(draw: Draw) -> list[Operation]:
    count, equal, length = draw.number(2, 3), draw.chance(0.3), draw.length()
    script: list[Operation] = [
        Begin(slot, draw.ids(length) if equal else draw.prompt(), sizes=draw.sizes())
        for slot in range(count)
    ]
    for _ in range(3):
        slots = tuple(slot for slot in range(count) if draw.chance(0.8)) or (0,)
        one = draw.chance(0.5)  # a decode step of all
        ids = tuple(draw.ids(1 if one else draw.number(1, 4)) for _ in slots)
        script.append(Together(slots, ids))
        script += [Feed(draw.pick(range(count)), draw.turn())] * draw.chance(0.3)
    return script


def _tenants(draw: Draw) -> list[Operation]:
    prompt, script = draw.prompt(), list[Operation]()
    for tenant in (0, 1, 0, 1):
        more = prompt[: draw.number(1, len(prompt))] + draw.turn()
        script += [Begin(tenant, more, sizes=draw.sizes(), tenant=tenant), End(tenant)]
    return script


def _evicted_from(tier: str) -> Callable[[Draw], list[Operation]]:
    def make(draw: Draw) -> list[Operation]:
        # Two that share nothing, so that one may come back in place of the other.
        tenants = [0, draw.number(0, 1) * (Ability.TENANTS in draw.abilities)]
        script: list[Operation] = []
        for slot, tenant in enumerate(tenants):
            script += [Begin(slot, draw.prompt(), sizes=draw.sizes(), tenant=tenant), End(slot)]
        for slot in range(2, 5):
            source = draw.number(0, slot - 1)
            tenants.append(tenants[source])
            script += _pushed_through(draw, tier, 0.8)
            begin = Begin(slot, draw.turn(), source, draw.length(), sizes=draw.sizes())
            script.append(replace(begin, tenant=tenants[source]))
            script += _pushed_through(draw, tier, 0.2)
            script += [Feed(slot, draw.turn()), End(slot)]
        return script

    return make


def _pushed_through(draw: Draw, tier: str, probability: float) -> list[Operation]:
    """Push results out of a tier so often, and out of each one above it half of the time."""
    above = draw.tiers[: draw.tiers.index(tier)]
    upper: list[Operation] = [Evict(each) for each in above if draw.chance(0.5)]
    return [*upper, *[Evict(tier)] * draw.chance(probability)]


def _mixed(draw: Draw) -> list[Operation]:
    """Do anything that the target can, in any order."""
    script: list[Operation] = [Begin(0, draw.prompt(), sizes=draw.sizes())]
    kinds = [name for name, ability in _MIXED.items() if ability in {None, *draw.abilities}]
    kinds += ["evict"] * bool(draw.tiers)
    chosen = (kinds[draw.number(0, len(kinds) - 1)] for _ in range(draw.number(4, 10)))
    return script + [_any(draw, kind) for kind in chosen]


_MIXED: dict[str, Ability | None] = {
    "begin": Ability.REUSE,
    "new": None,
    "feed": None,
    "trim": Ability.TRIM,
    "draft": Ability.DRAFT,
    "fork": Ability.FORK,
    "cancel": Ability.CANCEL,
    "end": None,
    "together": Ability.BATCH,
}


def _any(draw: Draw, kind: str) -> Operation:
    slot, other = draw.number(0, 2), draw.number(0, 2)
    tenant = draw.number(0, 1) * (Ability.TENANTS in draw.abilities)
    begin = Begin(slot, draw.turn(), other, draw.length(), None, draw.sizes(), tenant)
    operations: dict[str, Callable[[], Operation]] = {
        "begin": lambda: begin,
        "new": lambda: Begin(slot, draw.prompt(), sizes=draw.sizes(), tenant=tenant),
        "feed": lambda: Feed(slot, draw.turn(), draw.sizes()),
        "trim": lambda: Trim(slot, draw.number(1, 5)),
        "draft": lambda: Draft(slot, draw.ids(4), draw.number(0, 4)),
        "fork": lambda: Fork(slot, other),
        "cancel": lambda: Cancel(slot, draw.turn(), draw.number(0, 2)),
        "end": lambda: End(slot, draw.chance(0.8)),
        "together": lambda: Together((slot, other), (draw.turn(), draw.turn())),
        "evict": lambda: Evict(draw.tiers[draw.number(0, len(draw.tiers) - 1)]),
    }
    return operations[kind]()


def _needs(*abilities: Ability) -> frozenset[Ability]:
    return frozenset(abilities)


_REUSE = _needs(Ability.REUSE)
SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("at-once", "a prompt in one pass", _sized(lambda _: ())),
        Scenario("ones", "a prompt in passes of one token", _sized(lambda _: (1,))),
        Scenario("fives", "a prompt in passes of five", _sized(lambda _: (5,))),
        Scenario("pieces", "a prompt in passes of any size", _sized(Draw.sizes)),
        Scenario("edges", "passes that end around windows, chunks and pages", _edges),
        Scenario("returns", "conversations that go on, turn by turn", _returns, _REUSE),
        Scenario("branches", "prompts that part from earlier ones anywhere", _branches, _REUSE),
        Scenario("edits", "prompts with a few tokens changed in the middle", _edits, _REUSE),
        Scenario(
            "truncations", "prompts that are the beginning of earlier ones", _truncations, _REUSE
        ),
        Scenario("forks", "going on in several ways", _forks, _needs(Ability.FORK)),
        Scenario("trims", "tokens taken back", _trims, _needs(Ability.TRIM)),
        Scenario(
            "drafts", "speculation: tokens accepted and rejected", _drafts, _needs(Ability.DRAFT)
        ),
        Scenario("cancels", "passes interrupted in any layer", _cancels, _needs(Ability.CANCEL)),
        Scenario(
            "batches",
            "passes of several conversations of uneven lengths",
            _batches,
            _needs(Ability.BATCH),
        ),
        Scenario(
            "tenants",
            "equal prompts of tenants that share nothing",
            _tenants,
            _needs(Ability.REUSE, Ability.TENANTS),
        ),
        *(
            Scenario(
                f"evicted-{tier}",
                f"results pushed out of the {tier}, and prompts that return",
                _evicted_from(tier),
                _REUSE,
                tier,
            )
            for tier in ("device", "host", "store")
        ),
        Scenario("mixed", "all of it, in any order", _mixed),
    )
}
"""Every scenario by name, in the order of reports."""
