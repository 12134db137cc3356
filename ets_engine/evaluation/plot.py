"""Accuracy against a cost as a figure, for reports, documents and sweeps; it measures nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from typing import TYPE_CHECKING

from ets_engine.errors import ConfigError
from ets_engine.evaluation.methods import split_name
from ets_engine.evaluation.rows import Estimate, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {  # family of a row's name -> its name in figures, colour (Okabe and Ito's, told apart by all), marker
    "greedy": ("greedy", "#000000", "x"),
    "majority": ("majority vote", "#999999", "v"),
    "weighted": ("vote weighted by the PRM", "#56b4e9", "s"),
    "best_of_n": ("best by the PRM", "#0072b2", "D"),
    "beam": ("beam", "#cc9900", "^"),
    "beam_sqrt": ("beam, square root", "#cc9900", "<"),
    "dvts": ("DVTS", "#cc9900", ">"),
    "rebase": ("REBASE", "#d55e00", "P"),
    "dora": ("DORA", "#d55e00", "X"),
    "ets_published": ("ETS as published", "#cc79a7", "h"),
    "ets_kv": ("ETS-KV", "#009e73", "d"),
    "ets": ("ETS", "#009e73", "*"),
}
_VARIANTS = ("#7b3294", "#a6611a", "#d01c8b", "#66a61e", "#4d4d4d", "#1f3b73")  # colours of changed settings
_SIZES = {"*": 13, "s": 9}  # of markers (points): a star looks small, and squares often lie below others
Cost = Callable[[Row], float | None]


@dataclass(frozen=True, slots=True)
class Point:
    """One method: what it costs, what it solves (%), and what tells it from the others of its series."""

    cost: float
    solved: Estimate
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Points that look alike.

    Attributes:
        family: Of `LOOKS`.
        points: In the order in which they are joined.
        label: In the legend, empty = the family's.
        joined: Whether a line joins them; only what was measured on the same problems should be.
    """

    family: str
    points: tuple[Point, ...]
    label: str = ""
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes.

    Attributes:
        title: Above it.
        cost: What is measured along the horizontal axis, with its unit.
        series: What is drawn.
        frontier: Whether a line joins what no other point beats; only where all have the same problems.
    """

    title: str
    cost: str
    series: tuple[Series, ...]
    frontier: bool = False


def panel_of(rows: Iterable[Row], cost: Cost, cost_label: str, title: str = "") -> Panel:
    """Every row at its cost: one series per family and changed settings, its widths joined.

    Args:
        rows: Perhaps of several summaries; those of unknown or zero cost are left out.
        cost: What a row costs.
        cost_label: What that is, with its unit.
        title: Above the panel; a width that all of them share is added to it, others stand beside the points of a
            series.
    """
    found: dict[tuple[str, str], list[tuple[Row, Point]]] = {}
    rows = list(rows)
    widths = {width for row in rows if (width := split_name(row.name)[1]) is not None}
    shared = f"width {min(widths)}" if len(widths) == 1 else ""
    for row in rows:
        family, width, note = split_name(row.name)
        value = cost(row)
        if value is not None and value > 0:
            point = Point(value, row.solved, "" if shared or width is None else str(width))
            found.setdefault((family, note), []).append((row, point))
    series: list[Series] = []
    for (family, note), members in found.items():
        points = tuple(point for _, point in sorted(members, key=lambda member: member[1].cost))
        joined = len({row.problems for row, _ in members}) == 1
        series.append(Series(family, points, f"{look(family)[0]}, {note}" if note else "", joined))
    counts = {row.problems for members in found.values() for row, _ in members}
    return Panel(", ".join(filter(None, (title, shared))), cost_label, tuple(series), frontier=len(counts) == 1)


def look(family: str) -> tuple[str, str, str]:
    """Name, colour and marker of a family; grey dots for one that is not known."""
    return LOOKS.get(family, (family, "#777777", "."))


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats, cheapest first: none costs less and is at least as good.

    Example:
        >>> pareto([(1, 30), (2, 20), (3, 50), (3, 40)])
        [(1, 30), (3, 50)]
    """
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found


def draw(panels: Sequence[Panel]) -> str:
    """The panels side by side with one legend, as SVG without fonts or links; the same bytes for the same figures.

    Raises:
        ConfigError: There is nothing to draw, or matplotlib is missing.
    """
    panels = [panel for panel in panels if panel.series]
    if not panels:
        raise ConfigError("no row has this cost, so there is nothing to draw")
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels = {one.label or look(one.family)[0] for panel in panels for one in panel.series}
    columns = 2 if len(panels) == 1 else 4
    height = 4.4 + 0.24 * -(-len(labels) // columns)
    figure = Figure(figsize=(6.4 if len(panels) == 1 else 5.2 * len(panels), height), layout="constrained")
    colours = variant_colours(panels)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _draw_panel(axes, panel, colours)
    _draw_legend(figure, columns)
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "ets"}):
        figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def require_matplotlib() -> None:
    """Refuse what could not be drawn.

    Raises:
        ConfigError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("a figure needs matplotlib: pip install 'ets-integrations[bench]'")


def variant_colours(panels: Sequence[Panel]) -> dict[str, str]:
    """A colour for every label of changed settings, the same one in all panels.

    Example:
        >>> same = Series("ets", (), "ETS, lambda_b=2")
        >>> other = Series("ets", (), "ETS, lambda_b=4")
        >>> list(variant_colours([Panel("", "", (same,)), Panel("", "", (other, same))]))
        ['ETS, lambda_b=2', 'ETS, lambda_b=4']
    """
    labels = dict.fromkeys(one.label for panel in panels for one in panel.series if one.label)
    return dict(zip(labels, cycle(_VARIANTS), strict=False))


def _draw_panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    for one in panel.series:
        _draw_series(axes, one, colours[one.label] if one.label else look(one.family)[1])
    if panel.frontier:
        found = pareto([(point.cost, point.solved.mean) for one in panel.series for point in one.points])
        axes.plot(*zip(*found, strict=True), color="0.6", linewidth=1, linestyle=":", zorder=1, label="not beaten")
    _scale(axes, [point.cost for one in panel.series for point in one.points])
    axes.set(title=panel.title, xlabel=panel.cost, ylabel="solved (%)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _draw_series(axes: Axes, series: Series, colour: str) -> None:
    name, _, marker = look(series.family)
    costs = [point.cost for point in series.points]
    means = [point.solved.mean for point in series.points]
    spread = [
        [point.solved.mean - point.solved.low for point in series.points],
        [point.solved.high - point.solved.mean for point in series.points],
    ]
    axes.errorbar(costs, means, yerr=spread, fmt="none", ecolor=colour, alpha=0.35, linewidth=1.2, zorder=2)
    axes.plot(
        costs,
        means,
        color=colour,
        marker=marker,
        markersize=_SIZES.get(marker, 7),
        markeredgecolor="white" if marker != "x" else None,
        markeredgewidth=0.8 if marker != "x" else 2,
        linestyle="-" if series.joined else "none",
        linewidth=1.2,
        label=series.label or name,
        clip_on=False,
        zorder=3,
    )
    below = series.family.startswith("ets")  # near neighbours have their tags on different sides
    tags: dict[tuple[float, float], list[str]] = {}
    for point in series.points if len(series.points) > 1 else ():
        tags.setdefault((point.cost, point.solved.mean), []).append(point.tag)
    for place, found in tags.items():
        under = below and place[1] > 5
        axes.annotate(
            ", ".join(filter(None, found)),
            place,
            textcoords="offset points",
            xytext=(0, -13) if under else (6, 4),
            ha="center" if under else "left",
            fontsize=7,
            color=colour,
        )


def _scale(axes: Axes, costs: Sequence[float]) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5, and more of them in less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(min(costs) * 0.8, max(costs) * 1.3)
    many = max(costs) < 6 * min(costs)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if many else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_legend(figure: Figure, columns: int) -> None:
    """Below all panels, each name once."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
