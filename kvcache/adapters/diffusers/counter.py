"""Numbers of steps, counted by the calls of a network: nobody tells a transformer of its loop."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvcache.diffusion.streams import Stream


class NextStep(NamedTuple):
    """The step of a call, unless another run begins with the call."""

    number: int
    restarts: bool | Tensor = False
    """Whether timesteps rise here, so that another run begins; on the device, a bool scalar."""


class StepCounter:
    """Numbers the steps of streams; of all together where they decide together.

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
        self._latest: dict[Stream | None, int] = {}
        self._passed: dict[Stream | None, set[Stream]] = {}
        self._timesteps: dict[Stream | None, float | Tensor | None] = {}

    def next(self, stream: Stream, told: int | None, timestep: float | Tensor | None) -> NextStep:
        """Return the step of the coming call for `stream`; nothing changes.

        told: its number, if a pipeline tells it.
        timestep: a number, or a tensor on the device; None if the call has none.
        """
        if told is not None:
            # A pipeline that numbers its steps ends a run by a number that goes back.
            return NextStep(told)
        number = self._number(stream)
        previous = self._timesteps.get(self._group(stream))
        if number == 0 or previous is None or timestep is None:
            return NextStep(number)
        # On the device this is not waited for here: it comes to the host with a decision.
        rises = timestep > previous
        return NextStep(number, bool(rises) if isinstance(timestep, float) else rises)

    def advance(self, stream: Stream, number: int, timestep: float | Tensor | None) -> None:
        """Count step `number` of `stream` as passed, at `timestep`."""
        group = self._group(stream)
        if self._latest.get(group) != number:
            self._passed[group] = set()
        self._latest[group] = number
        self._passed[group].add(stream)
        self._timesteps[group] = timestep

    def _number(self, stream: Stream) -> int:
        group = self._group(stream)
        latest = self._latest.get(group, 0)
        number = latest + (stream in self._passed.get(group, ()))
        return 0 if number == self._steps else number

    def _group(self, stream: Stream) -> Stream | None:
        return None if self._shared else stream
