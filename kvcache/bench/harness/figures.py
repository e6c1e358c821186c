"""Common parts of all figures: colors, markers, grid and legend. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which any eye can tell apart.
SKY, BLUE, GREEN, BLACK, GREY = "#56b4e9", "#0072b2", "#009e73", "#000000", "#999999"
OTHER_COLORS = ("#d55e00", "#e69f00", "#cc79a7", "#a6761d", "#b2a800")
_MARKERS = "osvD^P"
MARKER_SIZE, LINE_WIDTH = 4, 1.3


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure; size: width and height in inches.

    Raises: ImportError without matplotlib; says what installs it.
    """
    try:
        # Without pyplot there is no window, no global list of figures, and no display is needed.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"a plot needs matplotlib ({error}). pip install 'kvcache[bench]'"
        ) from error
    return Figure(figsize=size, layout="constrained")


def marker(number: int) -> str:
    """Return the marker of line `number`: lines differ in black and white, too."""
    return _MARKERS[number % len(_MARKERS)]


def add_grid(panel: Axes) -> None:
    """Draw faint lines behind the data of `panel`."""
    panel.grid(visible=True, color="#dddddd", linewidth=0.6)


def add_legend(figure: Figure, colors: dict[str, str], columns: int) -> None:
    """Explain below the panels the lines by name: color, and marker in the order of `colors`."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=color, marker=marker(i), markersize=MARKER_SIZE, label=name)
        for i, (name, color) in enumerate(colors.items())
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
