"""Figures of rows: panels of series, in colours that colour-blind people tell apart."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._report import save_figure

# Okabe and Ito, Color Universal Design (2008), without the yellow, which is pale on
# white. Past the last colour they come again, with other markers and dashes.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = (("o", "-"), ("s", "--"), ("^", ":"))
# The width of a place on an axis of names that all series share.
SHARED = 0.7
# Where a bar that would reach 0 ends on a logarithmic axis, as a part of its point.
LOWEST = 0.1
BARS = "bars: ± one standard deviation"
CUT = f"lower ends at {LOWEST} of a point are cut there"
NOTHING = "Nothing to draw: no row has a time without compilation, or too few have."


@dataclass(frozen=True)
class Point:
    """x is a number, or the index of a name; spread is a standard deviation."""

    x: float
    y: float
    spread: float | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    series: points by name; a name has one colour in all panels of a figure.
    names: of the places on the x axis, which then is no scale.
    outlined: points of a second kind, drawn hollow in the colour of the series.
    limits: points of no series, drawn as short black bars.
    log_x, log_y: whether the axis is logarithmic; else y starts at 0.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    names: Sequence[str] = ()
    outlined: Mapping[str, Sequence[Point]] | None = None
    limits: Sequence[Point] = ()
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Figure:
    """A grid of panels with one legend.

    labels: what the legend adds to the name of a series.
    outlined, limits: what points of these kinds are.
    """

    panels: Sequence[Sequence[Panel]]
    title: str = ""
    labels: Mapping[str, str] | None = None
    outlined: str = ""
    limits: str = ""

    @property
    def names(self) -> list[str]:
        panels = [panel for row in self.panels for panel in row]
        return list(dict.fromkeys(n for p in panels for n in (*p.series,)))


def style(names: Sequence[str], name: str, joined: bool = True) -> dict[str, Any]:
    """Its colour, mark and line: rings in rings, where several series agree.

    joined: whether there is a line; else the marks are full, and side by side.
    """
    i = list(names).index(name)
    marker, dashes = MARKS[i // len(PALETTE) % len(MARKS)]
    look = {"color": PALETTE[i % len(PALETTE)], "marker": marker, "lw": 1.3}
    if not joined:
        return look | {"ls": "", "ms": 5, "mfc": look["color"]}
    size = 4 + 8 * (len(names) - 1 - i) / max(8, len(names) - 1)
    return look | {"ls": dashes, "ms": size, "mfc": "none"}


def draw(figure: Figure, path: Path, meta: Mapping[str, Any]) -> None:
    """Write the figure, with the device, the dtype and the revision in its corner."""
    # Only here: it is an optional package, and the tables do not need it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows, columns = len(figure.panels), len(figure.panels[0])
    size = max(8.5, 0.8 + 3.6 * columns), 1.2 + 3.1 * rows
    drawn, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharey="row", sharex="col"
    )
    names = figure.names
    bars: set[str] = set()
    for panels, line in zip(figure.panels, axes, strict=True):
        for panel, axis in zip(panels, line, strict=True):
            bars |= _draw_panel(axis, panel, names)
        # Panels of a row share the axis; only now all points are there.
        if not panels[0].log_y:
            line[0].set_ylim(0, 1.05 * line[0].get_ylim()[1])
        line[0].set_ylabel(panels[0].y)
    for axis, panel in zip(axes[-1], figure.panels[-1], strict=True):
        axis.set_xlabel(panel.x)
    labels = figure.labels or {}
    joined = not figure.panels[0][0].names
    handles = [
        Line2D(
            [], [], label=f"{name}{labels.get(name, '')}", **style(names, name, joined)
        )
        for name in names
    ]
    shared: dict[str, Any] = {"color": "black", "ls": ""}
    if figure.outlined:
        handles.append(
            Line2D([], [], marker="D", mfc="white", label=figure.outlined, **shared)
        )
    if figure.limits:
        handles.append(Line2D([], [], marker="_", ms=12, label=figure.limits, **shared))
    _place_legend(drawn, handles, bool(figure.title))
    if figure.title:
        drawn.suptitle(figure.title, x=0.01, ha="left", fontsize=10)
    text = f"{meta['device']}, {meta['dtype']}, jaxkern {meta.get('revision')}"
    text = "; ".join([*sorted(bars), text])
    drawn.text(0.995, 0.005, text, ha="right", va="bottom", fontsize=7)
    save_figure(drawn, path)
    plt.close(drawn)


def _place_legend(drawn: Any, handles: list[Any], titled: bool) -> None:
    """Above the panels, in columns that fit the width."""
    longest = max(len(h.get_label()) for h in handles)
    columns = max(
        1, min(len(handles), int(drawn.get_figwidth() / (0.5 + longest / 14)))
    )
    lines = -(-len(handles) // columns)
    title = 0.3 if titled else 0.05
    height = drawn.get_figheight()
    drawn.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - title / height),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
    )
    top = 1 - (title + 0.15 + 0.2 * lines) / height
    drawn.tight_layout(rect=(0, 0.02, 1, top))


def _draw_panel(axis: Any, panel: Panel, names: Sequence[str]) -> set[str]:
    """Draw all points; return what is to be said of their bars."""
    places = [n for n in names if n in panel.series]
    said: set[str] = set()
    for i, name in enumerate(places):
        # There is nothing between two names.
        look = style(names, name, joined=not panel.names)
        shift = SHARED * ((i + 0.5) / len(places) - 0.5) if panel.names else 0.0
        points = panel.series[name]
        xs, ys = [p.x + shift for p in points], [p.y for p in points]
        axis.plot(xs, ys, **look)
        known = [p for p in points if p.spread]
        lower = [p.spread or 0 for p in known]
        if known:
            said.add(BARS)
        if panel.log_y:
            # 0 has no place on a log axis.
            most = [(1 - LOWEST) * p.y for p in known]
            if any(map(operator.gt, lower, most)):
                said.add(CUT)
            lower = list(map(min, lower, most))
        axis.errorbar(
            [p.x + shift for p in known],
            [p.y for p in known],
            [lower, [p.spread for p in known]],
            fmt="none",
            ecolor=look["color"],
            elinewidth=1,
            capsize=2,
        )
        for p in (panel.outlined or {}).get(name, ()):
            axis.plot(
                p.x + shift, p.y, "D", color=look["color"], mfc="white", ms=5, zorder=3
            )
    for p in panel.limits:
        axis.hlines(p.y, p.x - 0.45, p.x + 0.45, "black", lw=1)
    _scale(axis, panel)
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.grid(lw=0.4)
    axis.set_axisbelow(True)
    return said


def _scale(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator

    xs = sorted({p.x for points in panel.series.values() for p in points})
    if panel.log_x:
        axis.set_xscale("log", base=2)
    if panel.names:
        axis.set_xticks(range(len(panel.names)), panel.names, fontsize=8)
        axis.set_xlim(-0.5, len(panel.names) - 0.5)
    else:
        axis.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=8)
        axis.minorticks_off()
    if panel.log_y:
        axis.set_yscale("log")
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
