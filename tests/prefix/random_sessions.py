"""Random sessions of several tenants with images and adapters, and the blocks they leave stored."""

import random

import numpy as np

from kvcache import KVCache
from kvcache.prefix import PrefixCache, adapter_salt

PLACEHOLDER = 99
ADAPTERS = ((), (), ("sql", "/adapters/sql"), ("law", ""))


class Asked:
    """What one session named: tokens, as a prompt has them, and all they were asked under."""

    def __init__(self, ids, media, salt, adapter):
        self.ids, self.media, self.salt, self.adapter = ids, media, salt, adapter

    @property
    def options(self):
        """Arguments of a session."""
        salt = adapter_salt(*self.adapter, salt=self.salt) if self.adapter else self.salt
        return {"salt": salt, "media": {(a, b): name for a, b, name in self.media}}


class RandomSessions:
    """Sessions over a prefix cache that evicts, drawn from a seed."""

    def __init__(self, seed, block_size=16, budget=6_000, namespace="", **options):
        self.chance = random.Random(seed)
        self.namespace, self.block_size = namespace, block_size
        options |= {"budget": budget, "namespace": namespace}
        self.prefix = PrefixCache([KVCache("numpy")], **options)
        self.prefix.events.block_size = block_size
        self.asked, self.known = [], {}

    def run(self):
        """One session, or now and then a call that evicts."""
        chance = self.chance
        if chance.random() < 0.02:
            return self.prefix.clear() if chance.random() < 0.2 else self.prefix.trim(2_000)
        asked = self._prompt()
        reply = [chance.randrange(70_000) for _ in range(chance.randrange(20))]
        session = self.prefix.session(asked.ids, **asked.options)
        whole = chance.random() < 0.8  # else it ends in the prompt, perhaps in an image
        size = session.remaining.size
        self._compute(session, size if whole else chance.randrange(size) + 1)
        if chance.random() < 0.3:
            session.commit()
        reply = reply if whole else []
        session.extend(reply)
        self._compute(session, len(reply))
        if reply and chance.random() < 0.3:
            session.truncate(len(asked.ids) + chance.randrange(len(reply)))
        session.close(store=chance.random() < 0.95)
        self.asked.append(Asked([*asked.ids, *reply], asked.media, asked.salt, asked.adapter))
        return None

    def _compute(self, session, tokens):
        if tokens:
            rows = np.zeros((1, 1, tokens, 1), np.float32)
            session.caches[0].update(rows, rows)

    def _prompt(self):
        """New tokens, often behind the beginning of earlier ones, perhaps with images."""
        chance = self.chance
        if self.asked and chance.random() < 0.7:
            base = chance.choice(self.asked[-12:])
            cut = chance.randrange(len(base.ids) + 1)
            ids, media = base.ids[:cut], [each for each in base.media if each[1] <= cut]
            salt, adapter = base.salt, base.adapter
        else:
            ids, media = [], []
            salt, adapter = chance.choice(["", "", "me", "ü"]), chance.choice(ADAPTERS)
        for _ in range(chance.randrange(3)):
            ids = [*ids, *(chance.randrange(70_000) for _ in range(chance.randrange(40)))]
            if chance.random() < 0.3:
                length = chance.choice([4, 20])
                name = chance.choice(["a cat", "a dog", "f" * 64])
                media = [*media, (len(ids), len(ids) + length, f"{name} {length}")]
                ids = [*ids, *[PLACEHOLDER] * length]
        return Asked(ids or [1], media, salt, adapter)

    def stored(self, hashes):
        """Names of the blocks that are stored, by those of all that was ever asked.

        hashes: of the blocks of a sequence, by another recipe.
        """
        names = set()
        for number, asked in enumerate(self.asked):
            hit = self.prefix.lookup([*asked.ids, 0], **asked.options)
            if hit.stored >= self.block_size:
                if number not in self.known:
                    media, adapter = tuple(asked.media), asked.adapter
                    self.known[number] = hashes(
                        asked.ids, asked.salt, self.namespace, self.block_size, media, adapter
                    )
                names.update(self.known[number][: hit.stored // self.block_size])
        return names
