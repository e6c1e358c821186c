"""What policies found of a recorded trace, by capacity: for people, files and figures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcache.prefix.policies import policy

from .replay import Request, ever, optimum, replay

if TYPE_CHECKING:
    from rich.console import RenderableType

OPTIMUM = "optimum"
"""In the place of a policy: what one finds that knows the future."""
FORMAT = "kvcache.simulate/1"

# Okabe and Ito's palette, which any eye can tell apart.
_COLORS = ("#0072b2", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#56b4e9")
_MARKERS = "osvD^P"
# Text stays text, and the same figure is the same file.
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": FORMAT}


@dataclass(frozen=True)
class Outcome:
    """What a policy found of the blocks asked for. capacity: tokens that the cache may hold."""

    policy: str
    capacity: int
    found: int
    evictions: int | None = None


@dataclass(frozen=True)
class Simulation:
    """Outcomes of one trace. blocks: asked for; found_before: of those, seen before at all."""

    trace: str
    block_size: int
    requests: int
    blocks: int
    found_before: int
    outcomes: tuple[Outcome, ...]

    @property
    def policies(self) -> list[str]:
        """In the order of simulation, the optimum last."""
        return list(dict.fromkeys(outcome.policy for outcome in self.outcomes))

    @property
    def capacities(self) -> list[int]:
        """Tokens, ascending."""
        return sorted({outcome.capacity for outcome in self.outcomes})

    def rate(self, name: str, capacity: int) -> float:
        """Percent of the blocks that the policy of that name found."""
        return self.percent(
            next(o.found for o in self.outcomes if (o.policy, o.capacity) == (name, capacity))
        )

    def percent(self, found: int) -> float:
        """Of the blocks asked for."""
        return 100 * found / max(1, self.blocks)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything counted, with what follows from it, to a JSON file."""
        record = {"format": FORMAT, **asdict(self)}
        for outcome in record["outcomes"]:
            outcome["percent"] = self.percent(outcome["found"])
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def to_table(self) -> RenderableType:
        """Hit rates for a rich console."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        title = "% of the blocks found, by tokens held"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
        for name in ("", *self.policies):
            table.add_column(name, justify="right", no_wrap=True)
        for capacity in self.capacities:
            rates = [self.rate(name, capacity) for name in self.policies]
            table.add_row(in_short(capacity), *(f"{rate:.2f}" for rate in rates))
        return Group(table, "", Text(self._summary, style="dim"))

    @property
    def _summary(self) -> str:
        return (
            f"{self.requests:,} requests for {self.blocks:,} blocks of {self.block_size} tokens; "
            f"{self.percent(self.found_before):.2f} % had been asked for before."
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a figure of hit rates over capacity; the suffix of `path` chooses the format.

        Raises: ImportError without matplotlib; says what installs it.
        """
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"a plot needs matplotlib ({error}). pip install 'kvcache[bench]'"
            ) from error
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        panel = figure.subplots()
        for at, name in enumerate(self.policies):
            self._line(panel, at, name)
        panel.set(xscale="log", xlabel="tokens held", ylabel="% of the blocks found")
        panel.set_xticks(self.capacities, [in_short(capacity) for capacity in self.capacities])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, color="#dddddd", linewidth=0.6)
        panel.legend(frameon=False)
        with rc_context(_SVG):
            figure.savefig(path, dpi=150, metadata=_undated(path))

    def _line(self, panel: Any, at: int, name: str) -> None:
        rates = [self.rate(name, capacity) for capacity in self.capacities]
        color = _COLORS[at % len(_COLORS)]
        style: dict[str, Any] = {"marker": _MARKERS[at % len(_MARKERS)], "color": color}
        if name == OPTIMUM:
            style = {"marker": ".", "linestyle": "--", "color": "#000000"}
        panel.plot(self.capacities, rates, label=name, markersize=4, linewidth=1.3, **style)


def run_simulation(
    trace: str,
    requests: Sequence[Request],
    policies: Sequence[str],
    capacities: Sequence[int],
    block_size: int,
    tick: Callable[[], None] = lambda: None,
) -> Simulation:
    """Replay a trace with every policy and the optimum, at every capacity in tokens.

    tick: called after each replay.

    Raises: ValueError; nothing was replayed then.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1 token; got {block_size}.")
    if small := [capacity for capacity in capacities if capacity < block_size]:
        raise ValueError(f"capacities are at least a block of {block_size} tokens; got {small[0]}.")
    for name in policies:
        policy(name)
    outcomes = []
    for capacity in capacities:
        for name in (*policies, OPTIMUM):
            outcomes.append(_outcome(requests, name, capacity, capacity // block_size))
            tick()
    blocks = sum(request.blocks.size for request in requests)
    found_before = ever(requests)
    return Simulation(trace, block_size, len(requests), blocks, found_before, tuple(outcomes))


def _outcome(requests: Sequence[Request], name: str, capacity: int, budget: int) -> Outcome:
    if name == OPTIMUM:
        return Outcome(name, capacity, optimum(requests, budget))
    found, index = replay(requests, policy(name), budget)
    return Outcome(name, capacity, found, index.evictions)


def in_short(tokens: int) -> str:
    """`tokens` with a unit: 300k, 2.5M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.4g}{name}"
    return str(tokens)


def _undated(path: str | os.PathLike[str]) -> dict[str, None]:
    """What a figure says about itself: not when it was made."""
    return {"Date": None} if Path(path).suffix == ".svg" else {}
