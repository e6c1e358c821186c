"""DiffusionCache: a recipe at work, eagerly, on any framework.

Decisions are made on the host, in NumPy scalars; of the arrays, one scalar at most comes there per
decision, and none if the policy goes by the step or its time.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Self

import numpy as np

from kvcache.backends import Array
from kvcache.errors import DiffusionCacheError, StepOrderError

from .history import Compute, Inputs, Outputs, owned_copy
from .measurement import change_on_host
from .recipe import Recipe, RunState, check_step
from .scalars import HOST, Scalar, host_scalar
from .signals import SignalInput
from .stats import DiffusionStats, StepRecord
from .step import Decision, Sites, Step
from .streams import Stream, Streams, bytes_of, distinct

_UNDECIDED = Decision()


@dataclass(frozen=True)
class _Run:
    """A run after its latest step: of one stream, or of all with shared decisions.

    Never changed: a step holds the run it began from, and may commit only to that one.
    """

    state: RunState
    reference: Array | None = None
    """Compared with the next signal: an array of ours, or a time; None before the first step."""
    decision: Decision = _UNDECIDED
    passed: frozenset[int] = frozenset()
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
        """Records of the steps of the present run."""
        return DiffusionStats(tuple(self._records))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return sum(map(bytes_of, self.arrays()))

    def arrays(self) -> list[Array]:
        """Return every array held: references of signals, then the last computed steps.

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
        x: Inputs,
        compute: Compute[Inputs, Outputs],
        *,
        signal: SignalInput = None,
        time: float | None = None,
        stream: Stream = 0,
    ) -> Outputs:
        """Return ``compute(x)`` or the prediction of it: :meth:`begin` and :meth:`Step.apply`.

        Raises: what these raise, and what `compute` raises; the cache is unchanged then.
        """
        with self.begin(step, signal=signal, time=time, stream=stream) as now:
            return now.apply(x, compute)

    def begin(
        self,
        step: int,
        *,
        signal: SignalInput = None,
        time: float | None = None,
        stream: Stream = 0,
        restart: bool = False,
    ) -> Step:
        """Decide about a step. Nothing changes before :meth:`Step.commit`.

        step: its number in the run, from 0 on; some may be left out. A number below the last one
            begins a new run.
        signal: what the policy measures, [B, ...], or a function that computes it if need be.
        time: where the step lies on the way from noise to data, the timestep or noise level;
            default: its number. Predictions go by it.
        restart: whether another run begins with this step, whatever its number; with its commit
            every stream forgets the run before.

        Raises: StepOrderError for a step that this stream has been through; UnknownStreamError;
            ShapeError; DiffusionCacheError for a negative step, or a signal that is missing.
        """
        number, index = operator.index(step), self._streams.number(stream)
        scalar_time = _scalar_time(number if time is None else time)
        run, sites = self._runs[self._run_of(index)], self._sites[index]
        latest = int(run.state.step)
        # Another stream has come to this step, and decided for this one, too.
        if number == latest >= 0 and index not in run.passed and not restart:
            after = replace(run, passed=run.passed | {index})
        else:
            check_step(number, -1 if restart else latest, f"stream {self.streams[index]!r}")
            before = run
            if restart or number < latest:
                before, sites = _Run(self.recipe.start()), {}
            after = self._decided(before, number, index, scalar_time, signal)
        # The run as it is now, not a new one: commit checks that nobody came in between.
        on_commit = partial(self._commit, index, restart, run, after)
        return Step(self.recipe.predictor, after.decision, scalar_time, sites, on_commit)

    @property
    def _measures_arrays(self) -> bool:
        measure = self.recipe.policy.signal
        return measure is not None and measure.array

    def _run_of(self, stream: int) -> int:
        return 0 if self._shared else stream

    def _decided(
        self, run: _Run, step: int, stream: int, time: Scalar, signal: SignalInput
    ) -> _Run:
        """Return `run` after `step` was decided about for `stream`; a measured array is copied."""
        measure, reference = self.recipe.policy.signal, run.reference
        if measure is None:
            decision, state = self._decide(run.state, step, host_scalar(np.float32(0)))
        else:
            value = measure.pick(signal, time)
            change = change_on_host(measure, value, reference)
            decision, state = self._decide(run.state, step, change)
            if decision.computes or measure.since == "previous":
                # The caller has that array, too, and may write to it.
                reference = owned_copy(value) if measure.array else value
        return _Run(state, reference, decision, frozenset({stream}))

    def _decide(self, state: RunState, step: int, change: Scalar) -> tuple[Decision, RunState]:
        # NaN and overflow are answers here: both mean to compute.
        with np.errstate(all="ignore"):
            computes, after = self.recipe.decide(HOST, state, host_scalar(np.int32(step)), change)
        return Decision(bool(computes), float(change)), after

    def _commit(
        self,
        stream: int,
        restart: bool,
        before: _Run,
        after: _Run,
        sites: Sites,
        computed: bool,
    ) -> None:
        """Make `after` and `sites` the state of `stream`, and record the step.

        Raises: StepOrderError if the run is no longer as it was when the step began.
        """
        run = self._run_of(stream)
        if self._runs[run] is not before:
            raise StepOrderError(
                "a step ends before another begins that decides with it, or a reset; "
                f"step {int(after.state.step)} of stream {self.streams[stream]!r} came too late."
            )
        if restart:
            self.reset()
        elif after.state.step < before.state.step:
            self._begin_anew(run)
        self._runs[run], self._sites[stream] = after, sites
        number, change = int(after.state.step), after.decision.change
        self._records.append(StepRecord(number, self.streams[stream], computed, change))

    def _begin_anew(self, run: int) -> None:
        """Forget the steps of all streams of `run`."""
        members = [n for n in range(len(self._streams)) if self._run_of(n) == run]
        for stream in members:
            self._sites[stream] = {}
        # Records keep the order of all streams, so they are sorted out by name.
        names = {self.streams[stream] for stream in members}
        self._records = [record for record in self._records if record.stream not in names]


def _scalar_time(time: float) -> Scalar:
    """Return `time` as a float32 scalar.

    Raises: DiffusionCacheError for one that is not finite, or too large.
    """
    with np.errstate(over="ignore"):  # what overflows float32 is refused below
        scalar = np.float32(time)
    if not np.isfinite(scalar):
        raise DiffusionCacheError(f"a time must be finite; got {time}.")
    return host_scalar(scalar)
