"""Hit rates of policies on a recorded trace, by capacity: for people, files and figures."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from kvcache._checks import as_index, as_indices, as_sizes
from kvcache.prefix.arguments import as_finite, as_list, check_text
from kvcache.prefix.policies import EvictionPolicy, Gittins, make_policy

from .ceiling import Informed, hazard_of
from .hints import hints_of
from .replay import as_requests, found_without_limit, optimum, replay
from .trace import Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType

HINTED = "hinted"
"""Name of `gittins` with hints which prompts return: see ``hints``."""
CEILING = "ceiling"
"""Name of the policy that knows the hazards which `gittins` has to learn: see ``ceiling``."""
OPTIMUM = "optimum"
"""Name of the upper bound among the policies: the hits possible with knowledge of the future."""
MOST_SEEDS = 100
FORMAT = "kvcache.simulate/1"

# Okabe and Ito's palette, which any eye can tell apart.
_COLORS = ("#0072b2", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#56b4e9")
_MARKERS = "osvD^P"
_BOUNDS = {HINTED: "-.", CEILING: ":", OPTIMUM: "--"}


@dataclass(frozen=True)
class Outcome:
    """Result of one policy at one capacity.

    capacity: tokens held at most. found: blocks found, of all requested. evictions: spans
    evicted, None for the optimum. Both are means, rounded, where seeds were varied.
    """

    policy: str
    capacity: int
    found: int
    evictions: int | None = None


@dataclass(frozen=True)
class Simulation:
    """Outcomes of one trace.

    block_size: tokens of a block. blocks: all requested. found_before: those requested before.
    hints: share of wrong ones among the hints of "hinted", None without it.
    """

    trace: str
    block_size: int
    requests: int
    blocks: int
    found_before: int
    outcomes: tuple[Outcome, ...]
    hints: float | None = None

    @property
    def policies(self) -> list[str]:
        """Names in the order of simulation, the ceiling and the optimum last."""
        return list(dict.fromkeys(outcome.policy for outcome in self.outcomes))

    @property
    def capacities(self) -> list[int]:
        """Tokens, ascending."""
        return sorted({outcome.capacity for outcome in self.outcomes})

    def rate(self, name: str, capacity: int) -> float:
        """Return the hit rate of a policy by name, in percent of all blocks.

        Raises: KeyError for a policy or capacity that was not simulated.
        """
        for outcome in self.outcomes:
            if (outcome.policy, outcome.capacity) == (name, capacity):
                return self.percent(outcome.found)
        raise KeyError(
            f"there is no {name!r} at {capacity!r} tokens; simulated were "
            f"{', '.join(self.policies)} at {', '.join(map(str, self.capacities))}."
        )

    def percent(self, found: int) -> float:
        """Return the percentage of all blocks requested."""
        return 100 * found / max(1, self.blocks)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write all counts and the percentages to a JSON file."""
        record = {"format": FORMAT, **asdict(self)}
        for outcome in record["outcomes"]:
            outcome["percent"] = self.percent(outcome["found"])
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def to_table(self) -> RenderableType:
        """Return the hit rates as a table for a rich console."""
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
        hints = ""
        if self.hints is not None:
            wrong = f"{100 * self.hints:g} % of it wrong"
            hints = f" {HINTED}: gittins, told which prompts return, {wrong}."
        return (
            f"{self.requests:,} requests for {self.blocks:,} blocks of {self.block_size} tokens; "
            f"{self.percent(self.found_before):.2f} % had been asked for before.{hints}"
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a figure of hit rates over capacity; the suffix of `path` chooses the format.

        Raises: ImportError without matplotlib; says what installs it. ValueError for a format that
            matplotlib does not write.
        """
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"a plot needs matplotlib ({error}). pip install 'kvcache[bench]'"
            ) from error
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        suffix, formats = Path(path).suffix, sorted(figure.canvas.get_supported_filetypes())
        if suffix[1:].lower() not in formats:
            raise ValueError(
                f"the suffix of a figure names its format, {', '.join(formats)}; got {suffix!r}."
            )
        axes = figure.subplots()
        for number, name in enumerate(self.policies):
            self._plot_line(axes, _line_style(number, name), name)
        axes.set(xscale="log", xlabel="tokens held", ylabel="% of the blocks found")
        axes.set_xticks(self.capacities, [in_short(capacity) for capacity in self.capacities])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False)
        # Text stays text, and the same figure is the same file.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": FORMAT}):
            figure.savefig(path, dpi=150, metadata=_undated(path))

    def _plot_line(self, axes: Axes, style: LineStyle, name: str) -> None:
        axes.plot(
            self.capacities,
            [self.rate(name, capacity) for capacity in self.capacities],
            label=name,
            marker=style.marker,
            markersize=4,
            linestyle=style.line,
            linewidth=1.3,
            color=style.color,
        )


class LineStyle(NamedTuple):
    """Look of one policy in a figure, in the terms of matplotlib."""

    marker: str
    color: str
    line: str = "-"


def _line_style(number: int, name: str) -> LineStyle:
    """Return the look of a policy by its number; bounds are black, and not solid."""
    if name in _BOUNDS:
        return LineStyle(".", "#000000", _BOUNDS[name])
    return LineStyle(_MARKERS[number % len(_MARKERS)], _COLORS[number % len(_COLORS)])


def run_simulation(
    trace: str,
    requests: Sequence[Request],
    policies: Sequence[str],
    capacities: Sequence[int],
    block_size: int,
    tick: Callable[[], None] = lambda: None,
    seeds: int = 1,
    hints: float | None = None,
) -> Simulation:
    """Replay a trace with every policy, the ceiling and the optimum, at every capacity in tokens.

    trace: name of it, for the report. tick: called after each outcome. seeds: of `gittins` and the
    ceiling, which compare samples of candidates, and of hints; the mean over so many is taken.
    hints: share of wrong hints, 0 to 1, of `gittins` with hints which prompts return; None to leave
    that out.

    Raises: ValueError, TypeError; nothing was replayed then.
    """
    # All before the first replay, because replays take minutes.
    check_text(trace, "the name of a trace is text")
    requests = as_requests(requests)
    block_size = as_index(block_size, "block_size")
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1 token; got {block_size}.")
    sizes = _checked_capacities(capacities, block_size)
    names = _checked_names(policies)
    if not callable(tick):
        raise TypeError(f"tick is a function without arguments; got {tick!r}.")
    [seeds] = as_sizes(seeds=seeds)
    if seeds > MOST_SEEDS:
        raise ValueError(f"seeds must be 1 to {MOST_SEEDS}; got {seeds}.")
    hints = None if hints is None else _as_share(hints)
    replays = Replays(requests, block_size, seeds, hints)
    outcomes = []
    for capacity in sizes:
        for name in (*names, *([] if hints is None else [HINTED]), CEILING, OPTIMUM):
            outcomes.append(replays.outcome(name, capacity))
            tick()
    blocks = sum(request.blocks.size for request in requests)
    found_before = found_without_limit(requests)
    return Simulation(
        trace, block_size, len(requests), blocks, found_before, tuple(outcomes), hints
    )


def _as_share(hints: float) -> float:
    """Return the share of wrong hints. Raises: TypeError, ValueError."""
    share = as_finite(hints, "hints are the share of wrong ones")
    if not 0 <= share <= 1:
        raise ValueError(f"hints are the share of wrong ones, 0 to 1; got {share}.")
    return share


def _checked_capacities(capacities: Sequence[int], block_size: int) -> list[int]:
    """Return capacities without repetitions. Raises: TypeError, ValueError."""
    sizes = list(dict.fromkeys(as_indices(capacities, "capacities")))
    if not sizes:
        raise ValueError("a simulation is of at least one capacity; got none.")
    if min(sizes) < block_size:
        raise ValueError(
            f"capacities are at least a block of {block_size} tokens; got {min(sizes)}."
        )
    return sizes


def _checked_names(policies: Sequence[str]) -> list[str]:
    """Return names of policies without repetitions. Raises: TypeError, ValueError."""
    # A str is iterable as well, but its letters are no names.
    if isinstance(policies, str):
        raise TypeError(f"policies are a list of names; got {policies!r}. Give [{policies!r}].")
    names: list[str] = []
    for name in as_list(policies):
        if not isinstance(name, str):
            raise TypeError(
                "a simulation makes each policy anew, by its name, a str; "
                f"got {reprlib.repr(name)}."
            )
        make_policy(name)
        names.append(name)
    return list(dict.fromkeys(names))


class Replays:
    """Replays of one trace.

    seeds: how many of each policy that has one. hints: share of wrong ones, None for none.
    """

    def __init__(
        self, requests: Sequence[Request], block_size: int, seeds: int, hints: float | None
    ) -> None:
        self._requests, self._block_size = requests, block_size
        hazard = hazard_of(requests, block_size)
        self._make: dict[str, Callable[[int], EvictionPolicy]] = {
            "gittins": Gittins,
            HINTED: Gittins,
            CEILING: lambda seed: Informed(hazard, seed),
        }
        self._seeds, self._hints = range(seeds), hints

    def outcome(self, name: str, capacity: int) -> Outcome:
        """Return the result of a policy, a bound, or `gittins` with hints at so many tokens."""
        budget = capacity // self._block_size
        if name == OPTIMUM:
            return Outcome(name, capacity, optimum(self._requests, budget))
        seeds = self._seeds if name in self._make else [0]
        runs = [self._run(name, seed, budget) for seed in seeds]
        found, evictions = (round(fmean(counts)) for counts in zip(*runs, strict=True))
        return Outcome(name, capacity, found, evictions)

    def _run(self, name: str, seed: int, budget: int) -> tuple[int, int]:
        """Return the blocks found, and the spans evicted."""
        policy = self._make[name](seed) if name in self._make else make_policy(name)
        hints = None
        if name == HINTED and self._hints is not None:
            hints = hints_of(self._requests, self._hints, seed)
        found, index = replay(self._requests, policy, budget, self._block_size, hints)
        return found, index.evictions


def in_short(tokens: int) -> str:
    """Return `tokens` with a unit: 300k, 2.5M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.4g}{name}"
    return str(tokens)


def _undated(path: str | os.PathLike[str]) -> dict[str, None]:
    """Return the metadata of a figure: without a date, to make equal files of equal figures."""
    return {"Date": None} if Path(path).suffix == ".svg" else {}
