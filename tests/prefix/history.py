"""An oracle of explanations: it follows what a prefix cache stores and evicts, token by token."""

from collections import defaultdict

from kvcache.prefix import BlockRemoved, BlockStored

from .block_names import hashes


class History:
    """Every token that was ever stored, by the name of all tokens up to it.

    Subscribes to a prefix cache, whose clock it is.
    """

    def __init__(self):
        self.now = 0.0
        self.evicted = {}
        """By name: the time of its eviction, None if it is stored."""
        self.followers = defaultdict(set)
        self.times = set()

    def clock(self):
        return self.now

    def follow(self, prefix):
        prefix.events.block_size = 1
        prefix.events.subscribe(self.note)
        return self

    def note(self, event):
        if isinstance(event, BlockStored):
            parent = event.parent_block_hash
            for name in event.block_hashes:
                self.evicted[name] = None
                self.followers[parent].add(name)
                parent = name
        elif isinstance(event, BlockRemoved):
            self.evicted |= dict.fromkeys(event.block_hashes, self.now)
            self.times.add(self.now)
        else:
            self.forget()

    def forget(self):
        """As clear() does with what was evicted before."""
        self.evicted.clear()
        self.followers.clear()

    def stored(self, names):
        """Tokens up to the last one that is stored."""
        known = [self.evicted.get(name, 0.0) is None for name in names]
        return max((n + 1 for n, kept in enumerate(known) if kept), default=0)

    def reasons(self, names, matched, media=()):
        """The reason of every token that was not reused."""
        size, stored = len(names), self.stored(names)
        known = next((n for n, name in enumerate(names) if name not in self.evicted), size)
        branches = known and self.followers[names[known - 1]]
        whys = []
        for place in range(matched, size):
            if place < min(stored, size - 1):
                inside = any(a < min(stored, size - 1) < b for a, b in media)
                whys.append("media" if inside else "no_resume_point")
            elif place < stored:
                whys.append("last")
            elif place < known:
                whys.append("evicted")
            else:
                whys.append("diverged" if branches else "new")
        return whys, known

    def check(self, explanation, names, matched, media=()):
        whys, known = self.reasons(names, matched, media)
        told = explanation.reasons
        assert explanation.matched == matched
        assert explanation.prompt == len(names)
        assert [reason.start for reason in told] == [matched, *(r.stop for r in told[:-1])]
        assert [reason.why for reason in told for _ in range(reason.tokens)] == whys
        assert sum(explanation.counts.values()) == len(names) - matched
        for reason in told:
            assert (reason.position == known) == (reason.why == "diverged")
            if reason.why == "evicted":
                # A stretch that is evicted piece by piece has the time of the last.
                actual = [self.evicted[name] for name in names[reason.start : reason.stop]]
                assert max(actual) <= reason.evicted
                assert reason.evicted in self.times


def names_of(ids, salt="", media=(), adapter=()):
    """The names of all tokens of a prompt."""
    return hashes(ids, salt, size=1, media=media, adapter=adapter)
