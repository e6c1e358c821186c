"""Steps, counted by the calls of a network: a transformer is not told where its loop is."""

from __future__ import annotations

from typing import Any

from kvcache.diffusion.streams import Stream


class Clock:
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
        self._last: dict[Stream | None, int] = {}
        self._seen: dict[Stream | None, set[Stream]] = {}
        self._timesteps: dict[Stream | None, Any] = {}

    def timestep(self, stream: Stream) -> Any:
        """That of the latest step of `stream`, or of those it decides with; None before."""
        return self._timesteps.get(self._group(stream))

    def next(self, stream: Stream) -> int:
        """The number of the step that a call for `stream` belongs to; nothing changes."""
        group = self._group(stream)
        last = self._last.get(group, 0)
        number = last + (stream in self._seen.get(group, ()))
        return 0 if number == self._steps else number

    def tick(self, stream: Stream, number: int, timestep: Any) -> None:
        """`stream` has been through step `number`, at `timestep`, as it was given."""
        group = self._group(stream)
        if self._last.get(group) != number:
            self._seen[group] = set()
        self._last[group] = number
        self._seen[group].add(stream)
        self._timesteps[group] = timestep

    def _group(self, stream: Stream) -> Stream | None:
        return None if self._shared else stream
