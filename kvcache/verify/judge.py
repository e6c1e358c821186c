"""Compares what a script gave with cold runs, and says what is wrong first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from kvcache.backends import HostArray

from .cold import ColdRuns, Noise
from .compare import difference, differences, tails
from .operations import Script
from .play import Observation, Played, play
from .target import Ability, Target

Against: TypeAlias = Literal["cold run", "run without a cache"]
OutcomeKind: TypeAlias = Literal["equal", "within noise", "different", "failed"]


@dataclass(frozen=True)
class Divergence:
    """The first token of which the logits are wrong.

    operation: number of the operation in the script. position: of the token in its conversation,
    and `token` its id. warm_top, cold_top: the likeliest next tokens. difference: the largest of
    logits behind it. against: with which run it was compared; equal to the cold run and different
    from the model without a cache means that the cache is wrong in cold runs, too.
    """

    operation: int
    position: int
    token: int
    warm_top: int
    cold_top: int
    difference: float
    against: Against

    def __str__(self) -> str:
        return (
            f"token {self.token} at position {self.position} (operation {self.operation}): "
            f"likeliest next token {self.warm_top}, {self.cold_top} in the {self.against}; "
            f"logits differ by {self.difference:.3g}"
        )


@dataclass(frozen=True)
class Outcome:
    """The result of one script.

    compared: passes compared. reused: tokens that were not computed. refused: operations that the
    cache said it cannot do. largest: the largest difference of logits. divergence: for "different".
    message: for "failed".
    """

    kind: OutcomeKind
    compared: int
    reused: int
    refused: int
    largest: float
    divergence: Divergence | None = None
    message: str = ""

    @property
    def good(self) -> bool:
        return self.kind in {"equal", "within noise"}

    def resembles(self, other: Outcome) -> bool:
        """Return whether both show the same kind of fault."""
        return self._fault == other._fault

    @property
    def _fault(self) -> tuple[OutcomeKind, str]:
        if self.divergence is not None:
            return self.kind, self.divergence.against
        # "operation 3: TrimError: ...": the name of the exception, whatever it says.
        _, _, reason = self.message.partition(": ")
        return self.kind, reason.partition(":")[0]


class Judge:
    """Runs scripts on a target, and compares."""

    def __init__(self, target: Target, noise: Noise) -> None:
        self.target, self.noise = target, noise
        self.cold = ColdRuns(target)

    def outcome(self, script: Script) -> Outcome:
        """Run `script` and compare every pass of it."""
        played = play(self.target, script)
        self.cold.clear()
        try:
            return self._compare(played)
        except Exception as error:  # noqa: BLE001 - a cold run that raises is a finding as well
            message = f"a cold run of the same passes: {type(error).__name__}: {error}"
            return self._outcome(played, "failed", 0, 0.0, message=message)

    def _compare(self, played: Played) -> Outcome:
        self.cold.prepare([observation.candidates[0] for observation in played.observations])
        largest = 0.0
        for compared, observation in enumerate(played.observations, 1):
            worst, divergence = self._check(observation)
            largest = max(largest, worst)
            if divergence is not None:
                return self._outcome(played, "different", compared, largest, divergence)
        count = len(played.observations)
        if played.failure is not None:
            message = f"operation {played.failure.operation}: {played.failure.message}"
            return self._outcome(played, "failed", count, largest, message=message)
        return self._outcome(played, "within noise" if largest else "equal", count, largest)

    def _outcome(
        self,
        played: Played,
        kind: OutcomeKind,
        compared: int,
        largest: float,
        divergence: Divergence | None = None,
        message: str = "",
    ) -> Outcome:
        return Outcome(kind, compared, played.reused, played.refused, largest, divergence, message)

    def _check(self, observation: Observation) -> tuple[float, Divergence | None]:
        """Return the largest difference, and where it is more than noise."""
        cold, gaps = self._nearest(observation)
        if (divergence := self._divergence(observation, cold, gaps, "cold run")) is not None:
            return float(gaps.max()), divergence
        worst = float(gaps.max(initial=0.0))
        if Ability.REFERENCE not in self.target.abilities:
            return worst, None
        rows = self.cold.reference(observation.ids)[observation.position :]
        gaps = differences(observation.logits, rows, self.target.partial)
        # Noise of the kernel, and so no part of `largest`: the passes of a run without a cache are
        # others.
        return worst, self._divergence(observation, rows, gaps, "run without a cache")

    def _nearest(self, observation: Observation) -> tuple[HostArray, HostArray]:
        """Return the cold logits of the candidate closest to what was seen, and the differences."""
        found: list[tuple[float, HostArray, HostArray]] = []
        for chunks in observation.candidates:
            warm, cold = tails(observation.logits, self.cold.logits(chunks))
            gaps = differences(warm, cold, self.target.partial)
            found.append((float(gaps.max(initial=0.0)), cold, gaps))
            if not found[-1][0]:
                break
        _, cold, gaps = min(found, key=lambda item: item[0])
        return cold, gaps

    def _divergence(
        self, observation: Observation, rows: HostArray, gaps: HostArray, against: Against
    ) -> Divergence | None:
        wrong = np.flatnonzero(gaps > self.noise.bound)
        if not wrong.size:
            return None
        row = int(wrong[0])
        warm = observation.logits[len(observation.logits) - len(rows) + row]
        position = len(observation.ids) - len(rows) + row
        return Divergence(
            operation=observation.operation,
            position=position,
            token=observation.ids[position],
            warm_top=top(warm),
            cold_top=top(rows[row]),
            difference=float(gaps[row]),
            against=against,
        )

    def first_layer(self, script: Script, divergence: Divergence) -> int | None:
        """Return the first layer whose hidden states are wrong; None where it shows in none.

        Runs `script` and the cold run once more, and notes the hidden states of their passes.
        """
        if Ability.LAYERS not in self.target.abilities:
            return None
        for observation in play(self.target, script, record=True).observations:
            last = len(observation.ids) - 1
            start = last + 1 - len(observation.logits)
            here = start <= divergence.position <= last
            if observation.operation == divergence.operation and here and observation.layers:
                cold = self._cold_layers(observation, divergence.against)
                return self._first_wrong(observation.layers, cold)
        return None

    def _cold_layers(self, observation: Observation, against: Against) -> Sequence[HostArray]:
        if against != "cold run":
            with self.target.layers() as layers:
                self.target.reference(observation.ids)
            return layers
        chunks = observation.candidates[0]
        with self.target.cold_trial() as trial:
            conversation = trial.begin(chunks[0])
            rest = [chunks[0][conversation.held :], *chunks[1:]]
            for chunk in rest[:-1]:
                conversation.forward(chunk)
            with self.target.layers() as layers:
                conversation.forward(rest[-1])
            conversation.end(store=False)
        return layers

    def _first_wrong(self, warm: Sequence[HostArray], cold: Sequence[HostArray]) -> int | None:
        # Hidden states have another scale than logits: noise is a share of both.
        share = self.noise.bound / self.noise.scale if self.noise.scale else 0.0
        for number, behind in enumerate(zip(warm, cold, strict=False)):
            one, other = tails(*behind)
            scale = float(np.max(np.abs(other), initial=0.0))
            if difference(one, other) > share * scale:
                return number
        return None


def top(row: HostArray) -> int:
    """Return the likeliest token; NaN is none. -1 if there is no other."""
    return int(np.nanargmax(row)) if not np.isnan(row).all() else -1
