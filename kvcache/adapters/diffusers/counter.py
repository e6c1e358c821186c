"""Numbers of steps, and where a run begins: nobody tells a transformer of its loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor

from kvcache.diffusion.streams import Stream

from .inputs import CallInputs
from .passes import PASSES
from .traces import Trace, Truth

FALLING, RISING = -1, 1

Timestep: TypeAlias = float | Tensor


@dataclass(frozen=True)
class NextStep:
    """The step of a call, as it is if nothing tells of another run."""

    number: int
    restarts: bool = False
    """Whether another run begins with it."""
    turns: bool = False
    """Whether it shows that timesteps run the other way."""
    before: int | None = None
    """Of a step that begins a run against the direction: steps before it that may belong to it."""
    jumps: Truth = False
    """Whether its latents do not follow from those before, so that another run begins."""
    against: Truth = False
    """Whether its timestep moves against the direction of the run, so that it is `otherwise`."""
    otherwise: NextStep | None = None
    furthest: Tensor | None = None
    """The furthest move of its latents in the run, if it goes on."""

    @property
    def doubtful(self) -> Truth:
        """Whether it is another step than this."""
        if isinstance(self.jumps, Tensor) and isinstance(self.against, Tensor):
            # Timesteps may be on the host.
            return self.jumps | self.against.to(self.jumps.device)
        return self.jumps | self.against

    def settled(self) -> NextStep:
        """Return the step that it is; this waits for the device."""
        if self.jumps:
            return NextStep(0, restarts=True, jumps=True)
        if self.against and self.otherwise:
            return replace(self.otherwise, furthest=self.furthest)
        return self


FIRST = NextStep(0)


@dataclass
class _Group:
    """Streams that number their steps together: one, or all that decide together."""

    number: int
    """Of the latest step."""
    passed: set[Stream] = field(default_factory=set)
    """Streams that have been through it."""


class StepCounter:
    """Numbers the steps of streams; of all together where they decide together.

    A run ends where a number that is told goes back, the layout of inputs changes, the latents
    jump, or the timestep moves against the direction. That is down, until two steps in a row move
    up: the first of them may be a run that begins after one that was given up, so it begins anew.

    shared: whether a stream that sits a step out keeps step with the others.
    steps: after so many a run is over, and numbers begin at 0 again; None: never.
    """

    def __init__(self, *, shared: bool, steps: int | None) -> None:
        # One step alone has no successor to tell its end by; as the first of a run it is computed.
        self._shared, self._steps = shared, steps if steps != 1 else None
        self.reset()

    def reset(self) -> None:
        """Begin at 0."""
        # By stream, or by None for all streams that decide together.
        self._groups: dict[Stream | None, _Group] = {}
        self._timesteps: dict[Stream | None, Timestep | None] = {}
        self._traces: dict[Stream, Trace] = {}
        self._latest_pass: Trace | None = None
        """Of the latest call without a context."""
        self._direction = FALLING
        self._before: int | None = None

    def next(
        self,
        stream: Stream,
        told: int | None,
        timestep: Timestep | None,
        inputs: CallInputs,
        alike: Stream | None,
    ) -> NextStep:
        """Return the step of the coming call for `stream`; nothing changes.

        told: its number, if a pipeline tells it.
        timestep: a number, or a tensor on the device; None if the call has none.
        alike: of a pass that is new, the stream with the same conditions, which has been at this
            timestep; `stream` itself where no new one is left.
        """
        trace = self._traces.get(stream)
        if trace is None and alike is not None:
            trace = self._traces.get(alike)
        if trace and trace.layout != inputs.layout:
            return NextStep(told or 0, restarts=True)
        trace = trace or self._pass_before(stream, inputs)
        if told is not None:
            return NextStep(told, restarts=self._goes_back(stream, told))
        number = self._number(stream)
        if number == self._steps:
            return NextStep(0, restarts=True)
        latest = self._timesteps.get(self._clock(stream))
        against: Truth = False
        if timestep is not None and latest is not None:
            # On the device this is not waited for here: it comes to the host with a decision.
            against = (timestep - latest) * self._direction < 0
        jumps: Truth = False
        furthest = None
        if trace:
            jumps, furthest = trace.follow(inputs.latents, again=stream == alike)
        otherwise = self._against_direction(stream, number)
        return NextStep(
            number, jumps=jumps, against=against, otherwise=otherwise, furthest=furthest
        )

    def advance(
        self, stream: Stream, step: NextStep, timestep: Timestep | None, inputs: CallInputs
    ) -> None:
        """Count `step`, which is settled, as passed by `stream` at `timestep`; cannot fail."""
        # The first step of a run whose timesteps rise is found to be part of it only later.
        trace = self._traces.get(stream) if step.before or not step.restarts else None
        if step.restarts:
            self.reset()
            self._before = step.before
        elif step.turns:
            self._turn()
        elif step.number:
            self._before = None  # it moves in the direction, which is established
        group = self._groups.setdefault(self._group(stream), _Group(step.number))
        if group.number != step.number:
            group.number, group.passed = step.number, set()
        group.passed.add(stream)
        self._timesteps[self._clock(stream)] = timestep
        if trace:
            trace = trace.then(inputs.latents, step.furthest)
        else:
            # A bool once it is settled; a tensor is False here.
            trace = Trace.begin(inputs, jumped=step.jumps is True)
        self._traces[stream] = trace
        if stream in PASSES:
            self._latest_pass = trace

    def _pass_before(self, stream: Stream, inputs: CallInputs) -> Trace | None:
        """Return the trace of the pass before a pass that is new; None if it is no such pass.

        The first step of a run comes to the timestep of the run before where that was given up
        after one: only its latents tell.
        """
        trace = self._latest_pass if stream in PASSES else None
        return trace if trace and trace.layout == inputs.layout else None

    def _goes_back(self, stream: Stream, told: int) -> bool:
        """Whether the number that a pipeline tells begins another run."""
        latest = max((group.number for group in self._groups.values()), default=0)
        # The first step again: a run was given up after one.
        group = self._groups.get(self._group(stream))
        return told < latest or (told == 0 and group is not None and stream in group.passed)

    def _against_direction(self, stream: Stream, number: int) -> NextStep:
        """Return the step of a call whose timestep moves against the direction."""
        group = self._groups.get(self._group(stream))
        only_one = group is not None and group.number == 0
        if only_one and self._before is not None:
            return NextStep(number + self._before, turns=True)
        # A move down begins a run in the direction that runs have at first.
        before = int(only_one) if self._direction == FALLING else None
        return NextStep(0, restarts=True, before=before)

    def _turn(self) -> None:
        """Take note that timesteps run the other way, from the step before the run on."""
        self._direction = -self._direction
        for group in self._groups.values():
            group.number += self._before or 0
        self._before = None

    def _number(self, stream: Stream) -> int:
        group = self._groups.get(self._group(stream))
        return 0 if group is None else group.number + (stream in group.passed)

    def _group(self, stream: Stream) -> Stream | None:
        return None if self._shared else stream

    def _clock(self, stream: Stream) -> Stream | None:
        """Return the stream whose timesteps are compared: one for all calls without a context."""
        return PASSES[0] if stream in PASSES else self._group(stream)
