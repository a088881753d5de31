"""Plots of `benchmarks.flash_mlp`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from . import _flash_mlp_model as model
from ._flash_mlp_model import PASSES, Shape
from ._flash_mlp_report import PUBLISHED_ROWS, by_shape, published_ms, shape_of
from ._harness import Row
from ._report import save_figure

COLOURS = {
    "mosaic_gpu": "#c1272d",
    "xla": "#0072b2",
    "naive jnp": "#8cc4e6",
    "plain jnp": "#56799a",
    "torch eager": "#e69f00",
    "torch compile": "#b3661a",
    "peer": "#7a3e9d",
    "published eager": "#d0d0d0",
    "published fused": "#8f8f8f",
}
NOTHING = "Nothing to draw: no row has a time without compilation."


def _steady(rows: Iterable[Row]) -> list[Row]:
    """The rows that hold a time without compilation in it."""
    return [r for r in rows if r["status"] == "ok" and not r["includes_compile"]]


def _pyplot() -> Any:
    # Only here: it is an optional package, and the tables do not need it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path, meta: Mapping[str, Any]) -> None:
    text = f"{meta['device']}, {meta['dtype']}, jaxkern {meta['revision']}"
    figure.text(0.995, 0.005, text, ha="right", va="bottom", fontsize=7)
    save_figure(figure, path)
    _pyplot().close(figure)


def plot(
    console: Console,
    rows: Sequence[Row],
    path: Path,
    meta: Mapping[str, Any],
    compared: bool,
) -> None:
    """Milliseconds of every implementation by shape, a panel a pass."""
    rows = _steady(rows)
    if not rows:
        console.print(NOTHING)
        return
    on_gpu = meta["platform"] == "gpu"
    shapes = list(by_shape(rows))
    passes = [which for which in PASSES if any(r["pass"] == which for r in rows)]
    bars = list(dict.fromkeys(row["implementation"] for row in rows))
    bars += PUBLISHED_ROWS if compared else []
    size = (9, 1.4 + 2.9 * len(passes))
    figure, axes = _pyplot().subplots(
        len(passes), 1, figsize=size, sharex=True, squeeze=False
    )
    for which, axis in zip(passes, axes[:, 0], strict=True):
        _draw_bars(axis, [r for r in rows if r["pass"] == which], shapes, bars, which)
        if on_gpu:
            for x, shape in enumerate(shapes):
                floor = max(model.floors_ms(shape, which).values())
                axis.hlines(floor, x - 0.45, x + 0.45, "black", ls="--", lw=1)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylabel("milliseconds (log scale)")
        axis.set_title(which, fontsize=10, loc="left")
        axis.grid(axis="y", lw=0.4)
        axis.set_axisbelow(True)
    axes[-1, 0].set_xticks(range(len(shapes)), [str(shape) for shape in shapes])
    axes[-1, 0].set_xlabel("(heads, batch, dim, hidden)")
    handles = [_patch(COLOURS[name], name) for name in bars]
    if on_gpu:
        handles.append(_line("black", "floor of an H200", ls="--", lw=1))
        handles.append(_diamond("kernels alone"))
    _legend(figure, handles)
    _save(figure, path, meta)


def _draw_bars(
    axis: Any, rows: list[Row], shapes: list[Shape], bars: list[str], which: str
) -> None:
    """Of one pass; the time of the kernels alone as diamonds."""
    width = 0.86 / len(bars)
    found = {(shape_of(row), row["implementation"]): row for row in rows}
    for i, name in enumerate(bars):
        for x, shape in enumerate(shapes):
            row = found.get((shape, name), {})
            ms = row.get("time_ms")
            if name in PUBLISHED_ROWS:
                line = model.PUBLISHED.get(shape)
                ms = published_ms(line, which, PUBLISHED_ROWS[name])
            if not ms:
                continue
            place = x + (i - (len(bars) - 1) / 2) * width
            axis.bar(place, ms, 0.92 * width, color=COLOURS[name])
            if row.get("device_ms"):
                axis.plot(place, row["device_ms"], "kD", mfc="white", ms=4, zorder=3)


def plot_sweep(
    console: Console,
    rows: Sequence[Row],
    path: Path,
    meta: Mapping[str, Any],
) -> None:
    """Rates by hidden size, a line a dim; a panel an implementation and pass."""
    rows = _steady(rows)
    if not rows:
        console.print(NOTHING)
        return
    on_gpu = meta["platform"] == "gpu"
    passes = [which for which in PASSES if any(r["pass"] == which for r in rows)]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    dims = sorted({int(row["dim"]) for row in rows})
    colours = {dim: f"C{i}" for i, dim in enumerate(dims)}
    figure, axes = _pyplot().subplots(
        len(passes),
        len(names),
        figsize=(max(10.5, 1.2 + 2.5 * len(names)), 1.4 + 2.8 * len(passes)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    factor, unit = (1, "TFLOP/s") if on_gpu else (1e3, "GFLOP/s")
    for which, row_of_axes in zip(passes, axes, strict=True):
        row_of_axes[0].set_ylabel(f"{which}\n{unit}")
        for name, axis in zip(names, row_of_axes, strict=True):
            for dim in dims:
                points = sorted(
                    (row["hidden"], factor * row["tflops"])
                    for row in rows
                    if (row["pass"], row["implementation"]) == (which, name)
                    and row["dim"] == dim
                )
                xs, ys = zip(*points, strict=True) if points else ((), ())
                axis.plot(xs, ys, "o-", ms=3.5, lw=1.4, color=colours[dim])
            if on_gpu:
                _draw_limits(axis, rows, which, colours)
            axis.grid(lw=0.4)
        # They share it: only now all lines are there.
        row_of_axes[0].set_ylim(bottom=0)
    for name, axis in zip(names, axes[0], strict=True):
        axis.set_title(name, fontsize=10)
    hidden = sorted({int(row["hidden"]) for row in rows})
    for axis in axes[-1]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(hidden, [str(h) for h in hidden], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("hidden")
    handles = [_line(colours[d], f"dim {d}", marker="o", ms=3.5) for d in dims]
    if on_gpu:
        handles.append(
            _line(
                "black",
                "at the floor of an H200 (in a dim's colour: of that dim)",
                ls="--",
                lw=1,
            )
        )
    _legend(figure, handles)
    _save(figure, path, meta)


def _draw_limits(
    axis: Any, rows: list[Row], which: str, colours: Mapping[int, str]
) -> None:
    """Rates at the floors: black where dims share one, else in the dim's colour."""
    limits: dict[tuple, set[int]] = {}
    for dim in colours:
        shapes = {s.hidden: s for s in map(shape_of, rows) if s.dim == dim}
        points = []
        for hidden, shape in sorted(shapes.items()):
            floor = max(model.floors_ms(shape, which).values())
            points.append(
                (hidden, round(model.count_flops(shape, which) / floor / 1e9))
            )
        limits.setdefault(tuple(points), set()).add(dim)
    for points, dims in limits.items():
        colour = colours[dims.pop()] if len(dims) == 1 else "black"
        axis.plot(*zip(*points, strict=True), "--", lw=1, color=colour)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _line(colour: str, label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, label=label, **style)


def _diamond(label: str) -> Any:
    return _line("black", label, marker="D", mfc="white", ms=4, ls="")


def _legend(figure: Any, handles: list[Any]) -> None:
    """Above the panels, in rows of at most seven."""
    rows = -(-len(handles) // 7)
    columns = -(-len(handles) // rows)
    figure.legend(
        handles=handles, loc="upper center", ncols=columns, frameon=False, fontsize=9
    )
    inches = 0.05 + 0.2 * rows
    figure.tight_layout(rect=(0, 0.015, 1, 1 - inches / figure.get_figheight()))
