"""The plot of `benchmarks.estimators`: time and memory against the batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ._estimators_report import KERNEL, TITLES, Found, peak_mib, total_ms
from ._harness import Row
from ._report import save_figure

COLOURS = {
    "fused": "#c1272d",
    "loop": "#606060",
    "einsum": "#0072b2",
    "bmm": "#2e8b57",
    "vmap": "#e69f00",
    "current": "#7a3e9d",
    KERNEL: "#56b4e9",
}
NOTHING = "Nothing to draw: no row of the model has a time without compilation."


def plot(
    console: Console, rows: Sequence[Row], path: Path, meta: Mapping[str, Any]
) -> None:
    """A panel of times and one of memory for each estimator, a line a method."""
    found: Found = {
        (r["estimator"], r["batch"], r["implementation"], r["pass"]): r
        for r in rows
        if r["part"] == "model" and r["status"] == "ok" and not r["includes_compile"]
    }
    estimators = [name for name in TITLES if any(key[0] == name for key in found)]
    if not estimators:
        console.print(NOTHING)
        return
    # Only here: it is an optional package, and the tables do not need it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(estimators), figsize=(1 + 4.2 * len(estimators), 6.4), squeeze=False,
        sharex=True, sharey="row",
    )  # fmt: skip
    quantities = {"ms, forward and backward": total_ms, "MiB, peak": peak_mib}
    for (label, read), line_of_axes in zip(quantities.items(), axes, strict=True):
        line_of_axes[0].set_ylabel(f"{label} (log scale)")
        for estimator, axis in zip(estimators, line_of_axes, strict=True):
            _draw(axis, found, estimator, read)
    for estimator, top, bottom in zip(estimators, *axes, strict=True):
        top.set_title(estimator, fontsize=10)
        bottom.set_xlabel("samples, each with its masks (log scale)")
    methods = dict.fromkeys(key[2] for key in found)
    handles = [axes[0, 0].plot([], [], **_style(m), label=m)[0] for m in methods]
    figure.legend(handles=handles, loc="upper center", ncols=7, frameon=False)
    text = f"{meta['device']}, {meta['dtype']}, jaxkern {meta['revision']}"
    figure.text(0.995, 0.005, text, ha="right", va="bottom", fontsize=7)
    figure.tight_layout(rect=(0, 0.015, 1, 0.95))
    save_figure(figure, path)
    plt.close(figure)


def _style(method: str) -> dict[str, Any]:
    # Rings in rings, where several agree.
    size = 4 + 1.6 * list(COLOURS).index(method)
    return {"color": COLOURS[method], "marker": "o", "ms": size, "mfc": "none"}


def _draw(axis: Any, found: Found, estimator: str, read: Any) -> None:
    from matplotlib.ticker import LogLocator

    batches = sorted({key[1] for key in found if key[0] == estimator})
    for method in dict.fromkeys(key[2] for key in found if key[0] == estimator):
        points = [(b, read(found, estimator, b, method)) for b in batches]
        points = [(b, value) for b, value in points if value is not None]
        axis.plot(*zip(*points, strict=True) if points else ((), ()), **_style(method))
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(b) for b in batches])
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(lw=0.4)
    axis.set_axisbelow(True)
