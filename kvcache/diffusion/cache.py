"""DiffusionCache: a recipe at work, eagerly, on any framework.

Decisions are made on the host, in NumPy scalars; of the arrays, one scalar at most comes there per
decision, and none if the policy goes by the step or its time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np

from kvcache.backends import Array, Backend, backend_of
from kvcache.errors import DiffusionCacheError, ShapeError, StepOrderError

from .history import Compute, check_unchanged, shapes
from .recipe import Past, Recipe, check_step
from .signals import Measured, Signal
from .step import Decision, Sites, Step, copied
from .streams import Stream, Streams, bytes_of, distinct


class StepRecord(NamedTuple):
    """What became of one step.

    computed: whether any of it was; in a skipped step, what has nothing to go by is.
    change: what the signal measured; NaN in the first step of a run, 0 if nothing is measured.
    """

    step: int
    stream: Stream
    computed: bool
    change: float


@dataclass(frozen=True)
class DiffusionStats:
    """What became of the steps of a run; of a DiffusionCache since it was last reset."""

    steps: tuple[StepRecord, ...]

    @property
    def computed(self) -> int:
        """Steps that were computed, each stream counted."""
        return sum(record.computed for record in self.steps)

    @property
    def skipped(self) -> int:
        """Steps that were predicted, each stream counted."""
        return len(self.steps) - self.computed

    @property
    def skip_rate(self) -> float:
        """Share of the steps that were predicted, 0 to 1."""
        return self.skipped / max(1, len(self.steps))


_UNDECIDED = Decision()


@dataclass(frozen=True)
class _Run:
    """What is decided together: the steps of one stream, or of all that share decisions."""

    past: Past
    reference: Any = None
    """What the signal compares with: an array of ours, or a time; None before the first step."""
    decision: Decision = _UNDECIDED
    seen: frozenset[int] = frozenset()
    """Streams that have been through the latest step."""


class DiffusionCache:
    """Computes some denoising steps and predicts the others, as its recipe says.

    ::

        cache = DiffusionCache(Recipe(Accumulated(0.1), HoldResidual()))
        for step, time in enumerate(times):
            signal = model.modulated_input(x, time)
            velocity = cache.run(step, x, network, signal=signal, time=time)

    recipe: when to compute, what to give otherwise.
    streams: how many passes there are per step, or their names; each keeps its own arrays. Under
        classifier-free guidance there are two.
    shared: whether the first stream that comes to a step decides it for the others, too; else
        each decides by its own signal.

    A run is over when its steps go backwards: then a stream, or all that share decisions, begin
    anew. What the cache keeps is its own copy or computed by it: callers may write to any array
    they gave or got. Not safe to use from several threads at once.
    """

    def __init__(
        self, recipe: Recipe, streams: int | Sequence[str] = 1, *, shared: bool = False
    ) -> None:
        self.recipe = recipe
        self._streams, self._shared = Streams(streams), shared
        self.reset()

    def __repr__(self) -> str:
        return f"<DiffusionCache {self.recipe} streams={self.streams} holds {self.nbytes} bytes>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.reset()

    @property
    def streams(self) -> tuple[int, ...] | tuple[str, ...]:
        """Names of the streams, or their numbers where they have none."""
        return self._streams.names

    @property
    def stats(self) -> DiffusionStats:
        """What became of each step of the present run."""
        return DiffusionStats(tuple(self._records))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return sum(map(bytes_of, self.arrays()))

    def arrays(self) -> list[Array]:
        """Every array held: what signals compare with, then the computed steps that are kept.

        A lazy framework should compute these at the end of a step, for example with
        ``mlx.core.eval(cache.arrays())``: until then they hold whatever they are computed from.
        """
        references = [run.reference for run in self._runs] if self._measures_arrays else []
        bundles = [
            arrays
            for sites in self._sites
            for site in sites.values()
            for arrays in site.history.kept
        ]
        return distinct([*references, *chain(*bundles)])

    def reset(self) -> None:
        """Let go of everything; the next step is the first of a run."""
        runs = 1 if self._shared else len(self._streams)
        self._runs = [_Run(self.recipe.start()) for _ in range(runs)]
        self._sites: list[Sites] = [{} for _ in range(len(self._streams))]
        self._records: list[StepRecord] = []

    def run(
        self,
        step: int,
        x: Any,
        compute: Compute,
        *,
        signal: Measured = None,
        time: float | None = None,
        stream: Stream = 0,
    ) -> Any:
        """``compute(x)`` or the prediction of it: :meth:`begin` and :meth:`Step.apply` in one.

        Raises: what these raise, and what `compute` raises; the cache is unchanged then.
        """
        with self.begin(step, signal=signal, time=time, stream=stream) as now:
            return now.apply(x, compute)

    def begin(
        self,
        step: int,
        *,
        signal: Measured = None,
        time: float | None = None,
        stream: Stream = 0,
    ) -> Step:
        """Decide about a step. Nothing changes before :meth:`Step.commit`.

        step: its number in the run, from 0 on; some may be left out. A number below the last one
            begins a new run.
        signal: what the policy measures, [B, ...], or a function that computes it if need be.
        time: where the step lies on the way from noise to data, the timestep or noise level;
            default: its number. Predictions go by it.

        Raises: StepOrderError for a step that this stream has been through; UnknownStreamError;
            ShapeError; DiffusionCacheError for a negative step, or a signal that is missing.
        """
        number, here = operator.index(step), self._streams.number(stream)
        with np.errstate(over="ignore"):
            when = np.float32(number if time is None else time)
        if not np.isfinite(when):
            raise DiffusionCacheError(f"a time must be finite; got {time}.")
        run, sites = self._runs[self._run_of(here)], self._sites[here]
        if number == run.past.step and here not in run.seen:
            after = replace(run, seen=run.seen | {here})
        else:
            check_step(number, int(run.past.step), f"stream {self.streams[here]!r}")
            before = run
            if number < run.past.step:
                before, sites = _Run(self.recipe.start()), {}
            after = self._decided(before, number, here, when, signal)
        keep = partial(self._commit, here, run, after)
        return Step(self.recipe.predictor, after.decision, when, sites, keep)

    @property
    def _measures_arrays(self) -> bool:
        measure = self.recipe.policy.signal
        return measure is not None and measure.array

    def _run_of(self, stream: int) -> int:
        return 0 if self._shared else stream

    def _decided(self, run: _Run, step: int, stream: int, time: Any, signal: Measured) -> _Run:
        measure = self.recipe.policy.signal
        value = None if measure is None else measure.pick(signal, time)
        with np.errstate(all="ignore"):
            change = np.float32(0) if measure is None else _change(measure, value, run.reference)
            computes, past = self.recipe.decide(np, run.past, np.int32(step), change)
        reference = run.reference
        if measure is not None and (computes or measure.since == "previous"):
            reference = copied(value) if measure.array and value is not None else value
        decision = Decision(bool(computes), float(change))
        return _Run(past, reference, decision, frozenset({stream}))

    def _commit(self, stream: int, before: _Run, after: _Run, sites: Sites, computed: bool) -> None:
        mine = self._run_of(stream)
        if self._runs[mine] is not before:
            raise StepOrderError(
                "a step ends before another begins that decides with it, or a reset; "
                f"step {int(after.past.step)} of stream {self.streams[stream]!r} came too late."
            )
        if after.past.step < before.past.step:
            self._begin_anew(mine)
        self._runs[mine], self._sites[stream] = after, sites
        change = after.decision.change
        record = StepRecord(int(after.past.step), self.streams[stream], computed, change)
        self._records.append(record)

    def _begin_anew(self, run: int) -> None:
        """Forget the steps of all streams that decide together."""
        gone = [n for n in range(len(self._streams)) if self._run_of(n) == run]
        for stream in gone:
            self._sites[stream] = {}
        names = {self.streams[stream] for stream in gone}
        self._records = [record for record in self._records if record.stream not in names]


def _change(measure: Signal, value: Any, reference: Any) -> Any:
    """float32 scalar on the host: the one number that a decision waits for."""
    if measure.array and not value.shape:
        raise ShapeError("a signal has at least one axis, such as [B, tokens, width]; got none.")
    if reference is None:
        return np.float32(np.nan)
    if not measure.array:
        return measure.change(np, value, reference)
    check_unchanged("a signal", shapes([reference]), shapes([value]))
    backend = backend_of(value)
    return np.float32(backend.to_host(_measurement(backend, measure)(value, reference)))


@lru_cache(maxsize=64)
def _measurement(backend: Backend, measure: Signal) -> Callable[[Array, Array], Array]:
    """The change that `measure` finds, as `backend` computes it fastest."""
    return backend.compile(partial(measure.change, backend.xp))
