"""Several caches behind one, for models with different kinds of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Self, TypeAlias

from kvcache._checks import as_index, as_indices
from kvcache._interrupts import uninterrupted
from kvcache._locks import Lock
from kvcache.backends import Array, Backend, CacheConfig
from kvcache.errors import NotSupportedError, ShapeError
from kvcache.snapshots.rows import exchange
from kvcache.snapshots.snapshot import CacheSpec, Part

from .ahead import TokensAhead
from .base import Cache
from .batch import Batch
from .latest import LatestPass, Progress, joined
from .owned import Commit
from .plan import ForwardPlan, PoolState, StatePlan
from .planning import Planned, PlanningCache
from .state_calls import Run, StatesAtCuts

Plan: TypeAlias = "ForwardPlan | StatePlan | tuple[Plan, ...]"
"""Plan of one cache; of a wrapper, a tuple of those of its parts."""
ProgramState: TypeAlias = "PoolState | tuple[ProgramState, ...]"
"""Buffers of one cache, or of the parts of a wrapper."""


class WrapperCache(PlanningCache[tuple[Plan, ...], tuple[ProgramState, ...]]):
    """Several caches with the same passes; the model chooses one of them for each layer.

    ::

        cache = WrapperCache(CausalCache(window=512), CausalCache())
        cache.set_layer_type(layer % 2)
        cache.set_layer(layer)
        cache.put(k, v)

    A plan is a tuple of those of the parts, in order, and so is the state of its programs.
    """

    def __init__(self, *caches: Cache) -> None:
        super().__init__()
        if not caches:
            raise ValueError("a wrapper needs at least one cache; got none.")
        self.caches = caches
        self._type = self._layer = 0
        for cache in caches:
            cache.enclose(self)

    def share_lock(self, lock: Lock) -> None:
        super().share_lock(lock)
        for cache in self.caches:  # one lock, because a change of the wrapper changes them all
            cache.share_lock(lock)

    def set_layer_type(self, index: int) -> None:
        """Choose the cache for `put`, `get` and `set_causal`, before or after `set_layer`.

        Raises: ValueError for an index without a cache.
        """
        index = index if type(index) is int else as_index(index, "index")
        if not 0 <= index < len(self.caches):
            raise ValueError(f"layer types here are 0 to {len(self.caches) - 1}; got {index}.")
        self._type = index
        self.underlying_cache.set_layer(self._layer)

    @property
    def underlying_cache(self) -> Cache:
        """Cache chosen last by :meth:`set_layer_type`, at first the first one."""
        return self.caches[self._type]

    @property
    def backend(self) -> Backend | None:
        return self.caches[0].backend

    def set_config(self, config: CacheConfig) -> None:
        for cache in self.caches:
            cache.set_config(config)

    def init(
        self,
        backend: str | Backend,
        dtype: str = "float32",
        *,
        max_sequences: int = 1,
        capacity: int,
        max_batch: int,
    ) -> None:
        sizes = {"max_sequences": max_sequences, "capacity": capacity, "max_batch": max_batch}
        try:
            with uninterrupted():
                for cache in self.caches:
                    cache.init(backend, dtype, **sizes)
        except BaseException:
            self.close()  # all of them, so that none is left initialised
            raise

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        return self._all(lambda cache: cache.prepare_forward(batch, reserve))

    def revert_forward(self) -> None:
        for cache in self.caches:
            cache.revert_forward()

    def pass_progress(self) -> Progress:
        return max([cache.pass_progress() for cache in self.caches])

    def note_whole(self) -> None:
        for cache in self.caches:
            cache.note_whole()

    def drop_pass(self) -> None:
        for cache in self.caches:
            cache.drop_pass()

    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        return self._all(lambda cache: cache.prepare_copy_prefix(source, target, length))

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        return self._all(lambda cache: cache.prepare_remove(sequence, start, stop))

    def _all(self, prepare: Callable[[Cache], Commit]) -> Commit:
        return _together([prepare(cache) for cache in self.caches])

    def holds_tokens(self, sequence: int) -> bool:
        return any(cache.holds_tokens(sequence) for cache in self.caches)

    def set_layer(self, layer: int) -> None:
        self._layer = layer
        self.underlying_cache.set_layer(layer)

    def put(
        self, keys: Array, values: Array | None = None, frames: Sequence[int] | None = None
    ) -> None:
        if frames is None:
            self.underlying_cache.put(keys, values)
        else:
            self.underlying_cache.put(keys, values, frames)

    def get(self) -> tuple[Array, Array | None, Array | None]:
        return self.underlying_cache.get()

    def attend(
        self,
        q: Array,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> Array:
        return self.underlying_cache.attend(q, scale=scale, softcap=softcap, sinks=sinks)

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.underlying_cache.runs

    def get_states(self) -> tuple[Array, ...] | None:
        return self.underlying_cache.get_states()

    def put_states(self, *arrays: Array, kept: StatesAtCuts | None = None) -> None:
        self.underlying_cache.put_states(*arrays, kept=kept)

    # Programs.

    @property
    def _planning(self) -> list[PlanningCache[Plan, ProgramState]]:
        """The parts. Raises: NotSupportedError unless all of them have plans."""
        parts = [cache for cache in self.caches if isinstance(cache, PlanningCache)]
        if len(parts) < len(self.caches):
            kinds = {type(cache).__name__ for cache in self.caches if cache not in parts}
            raise NotSupportedError(
                f"a wrapper has plans if all of its parts do; {', '.join(sorted(kinds))} has none. "
                "Call start_forward here, and plan() of the other parts."
            )
        return parts

    def export_programs(self) -> tuple[ProgramState, ...]:
        return tuple(cache.export_programs() for cache in self._planning)

    def prepare_import(self, state: tuple[ProgramState, ...]) -> Commit:
        parts = self._planning
        if len(state) != len(parts):
            raise ShapeError(
                f"a wrapper of {len(parts)} caches has as many states; got {len(state)}."
            )
        pairs = zip(parts, state, strict=True)
        take_over = _together([cache.prepare_import(own) for cache, own in pairs])

        def commit() -> None:
            with uninterrupted():  # a pass is complete in all parts or in none
                take_over()

        return commit

    def has_plans(self) -> bool:
        return any(cache.has_plans() for cache in self._planning)

    def prepare_replan(self, batch: Batch) -> Commit:
        return _together([cache.prepare_replan(batch) for cache in self._planning])

    def tokens_begun(self) -> int:
        return self._planning[0].tokens_begun()

    def pass_savepoint(self) -> Commit:
        return _together([cache.pass_savepoint() for cache in self._planning])

    def plan_begun(self, tokens: int | None, reads: bool) -> tuple[Plan, ...]:
        return tuple(cache.plan_begun(tokens, reads) for cache in self._planning)

    def begin_steps(self, batch: Batch, steps: int, reads: bool) -> Planned[tuple[Plan, ...]]:
        planned: list[Planned[Plan]] = []

        def undo() -> None:
            for part in reversed(planned):
                part.undo()

        try:
            with uninterrupted():  # between its return and its place in the list, a plan is lost
                planned.extend(cache.begin_steps(batch, steps, reads) for cache in self._planning)
        except BaseException:
            undo()
            raise
        return Planned(tuple(part.plan for part in planned), undo)

    def set_causal(self, except_: TokensAhead = ()) -> None:
        self.underlying_cache.set_causal(except_)

    def can_resume(self, sequence: int, position: int) -> bool:
        return all(cache.can_resume(sequence, position) for cache in self.caches)

    def latest_pass(self, sequence: int) -> LatestPass:
        return joined([cache.latest_pass(sequence) for cache in self.caches])

    # Snapshots.

    @property
    def max_sequences(self) -> int:
        return self.caches[0].max_sequences

    @property
    def specs(self) -> list[CacheSpec]:
        return [spec for cache in self.caches for spec in cache.specs]

    def next_position(self, sequence: int) -> int:
        return max(cache.next_position(sequence) for cache in self.caches)

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        points = as_indices(positions, "positions")  # an iterator serves the first cache only
        with uninterrupted():
            for cache in self.caches:
                cache.schedule(sequence, points)

    def checkpoint(self, sequence: int) -> None:
        with uninterrupted():
            for cache in self.caches:
                cache.checkpoint(sequence)

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        specs = self.specs
        return exchange(
            (),
            lambda: (part.rows for c in self.caches for part in c.capture(sequence, start, stop)),
            lambda rows: list(map(Part, specs, rows)),
        )

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        commits, first = [], 0
        for cache in self.caches:
            last = first + len(cache.specs)
            own_parts = [snapshot_parts[first:last] for snapshot_parts in parts]
            commits.append(cache.prepare_restore(sequence, own_parts, position))
            first = last
        return _together(commits)

    def to_backend(self, backend: str | Backend) -> Self:
        clone = self._shallow_copy()
        clone.caches = tuple(cache.to_backend(backend) for cache in self.caches)
        clone._enclosing, clone.lock = None, Lock()
        for cache in clone.caches:
            cache.enclose(clone)
        return clone

    def prepare_close(self) -> Commit:
        commits = [cache.prepare_close() for cache in self.caches]

        def commit() -> None:
            with ExitStack() as stack:  # calls all of them, even if one raises
                for commit_one in reversed(commits):
                    stack.callback(commit_one)

        return commit


def _together(commits: Sequence[Commit]) -> Commit:
    """Return one commit for all of `commits`, in order."""

    def commit_all() -> None:
        for commit in commits:
            commit()

    return commit_all
