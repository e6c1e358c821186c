"""Passes over a pool as one program each: planned on the host, applied by functional calls."""

import numpy as np

from kvcache import Batch, functional
from kvcache.verify import Ability
from kvcache.verify.targets.nets import InterruptedPassError, LlamaNet
from kvcache.verify.targets.reference import RULES, PoolTarget

KV_HEADS, HEAD_DIM = 2, 8


class ProgramNet(LlamaNet):
    """Compiled where the backend compiles; interrupted between the plan and its program."""

    def __init__(self, backend, rules):
        super().__init__(backend, rules)
        self.step = backend.compile(self.program, donate=[0])

    def over_pool(self, parts, cache):
        tokens = [
            (sequence, start + i, token)
            for sequence, start, ids in parts
            for i, token in enumerate(ids)
        ]
        sequences, positions, ids = zip(*tokens, strict=True)
        width = self.padded(len(ids))
        plan = cache.plan(Batch(positions, sequences), tokens=width)
        if self.interrupt is not None:
            raise InterruptedPassError("planned, and not computed")
        # The last token again, as in the plan: it writes the same cell twice.
        rows = [
            np.pad(numbers, (0, width - len(ids)), "edge")[None] for numbers in (ids, positions)
        ]
        state = cache.program_state
        cache.program_state, logits = self.step(state, plan, *self.arguments(*rows))
        return self.backend.to_host(logits)[0, : len(ids)]

    def padded(self, count):
        """Few lengths, where each is compiled by itself."""
        return 1 << (count - 1).bit_length() if self.backend.config.padding > 1 else count

    def program(self, state, plan, ids, cos, sin):
        def through(layer, keys, values):
            nonlocal state
            state = functional.put(state, plan, layer, keys[0], values[0])
            held = functional.get(state, plan, layer)
            return held[0][None], held[1][None], held[2]

        logits = self.logits(ids, cos, sin, through)
        return state, logits


class ProgramTarget(PoolTarget):
    """A pool whose passes are programs."""

    def __init__(self, kind, backend="numpy", **options):
        super().__init__(kind, backend, **options)
        self.name += ", programs"
        self.net = ProgramNet(self.net.backend, RULES[kind])
        self.abilities -= {Ability.LAYERS}

    def pool(self):
        cache = super().pool()
        cache.allocate(range(self.net.layers), KV_HEADS, HEAD_DIM)
        return cache
