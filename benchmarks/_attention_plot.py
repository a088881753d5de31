"""The plot of `benchmarks.attention`: how time and memory grow with the sequence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ._attention_report import allocated_mib
from ._harness import Row
from ._report import save_figure

# Those of one kind share a colour; peers are grey, causal rows dashed.
COLOURS = {
    "attention": "#c1272d",
    "dilated quarters": "#0072b2",
    "dilated halves": "#56b4e9",
    "dilated fixed": "#004c6d",
    "block-sparse": "#2e8b57",
    "ring": "#7a3e9d",
    "jax.nn": "#a0a0a0",
    "torch sdpa": "#e69f00",
    "torch flex": "#b3661a",
    "tokamax": "#d16ba5",
    "plain jnp quarters": "#d8b365",
    "plain jnp": "#606060",
}
QUANTITIES = {
    "milliseconds": lambda row: row["time_ms"],
    "MiB of results and temporaries": allocated_mib,
}
NOTHING = "Nothing to draw: no implementation has times of two lengths or more."


def exponent(seqs: Sequence[float], values: Sequence[float]) -> float:
    """b of the least-squares fit log value = a + b log seq."""
    return float(np.polyfit(np.log(seqs), np.log(values), 1)[0])


def lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of the real grid by implementation, where there are several lengths."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        steady = row["status"] == "ok" and not row["includes_compile"]
        if steady and row["grid"] == "real":
            found.setdefault(row["implementation"], []).append(row)
    return {name: group for name, group in found.items() if len(group) > 1}


def plot(
    console: Console, rows: Sequence[Row], path: Path, meta: Mapping[str, Any]
) -> None:
    """Time and memory against the length, with the exponent that fits each line."""
    by_name = lines(rows)
    if not by_name:
        console.print(NOTHING)
        return
    # Only here: it is an optional package, and the tables do not need it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 6.4))
    for axis, (label, read) in zip(axes, QUANTITIES.items(), strict=True):
        _draw(axis, by_name, label, read)
    first = next(iter(by_name.values()))[0]
    sizes = f"batch {first['batch']}, {first['heads']} heads, dim {first['dim']}"
    text = f"{first['pass']}, {sizes}; in brackets: b of time ~ n^b, of memory ~ n^b"
    figure.suptitle(text, x=0.01, ha="left", fontsize=10)
    text = f"{meta['device']}, {meta['dtype']}, jaxkern {meta['revision']}"
    figure.text(0.995, 0.005, text, ha="right", va="bottom", fontsize=7)
    # The longest-lasting first.
    names = sorted(by_name, key=lambda name: -by_name[name][-1]["time_ms"])
    handles = [
        axes[0].plot([], [], **_style(name), label=_legend(name, by_name[name]))[0]
        for name in names
    ]
    inches = 0.35 + 0.19 * -(-len(names) // 3)
    figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, inches / figure.get_figheight()),
        ncols=3,
        frameon=False,
        fontsize=8.5,
    )
    figure.tight_layout(rect=(0, inches / figure.get_figheight(), 1, 0.99))
    save_figure(figure, path)
    plt.close(figure)


def _points(group: Sequence[Row], read: Any) -> tuple[list[int], list[float]]:
    # A torch row has no compiler's plan, so no memory on a CPU.
    known = [row for row in group if read(row)]
    return [row["seq"] for row in known], [read(row) for row in known]


def _legend(name: str, group: Sequence[Row]) -> str:
    points = (_points(group, read) for read in QUANTITIES.values())
    fits = [f"{exponent(*p):.2f}" if len(p[0]) > 1 else "-" for p in points]
    return f"{name}  ({', '.join(fits)})"


def _style(name: str) -> dict[str, Any]:
    causal = name.endswith("causal")
    return {
        "color": _colour(name),
        "marker": "s" if name.startswith("plain") else "o",
        "ls": "--" if causal else "-",
        "mfc": "white" if causal else _colour(name),
        "ms": 4,
        "lw": 1.4,
    }


def _draw(axis: Any, by_name: Mapping[str, list[Row]], label: str, read: Any) -> None:
    for name, group in by_name.items():
        axis.plot(*_points(group, read), **_style(name))
    seqs = sorted({row["seq"] for group in by_name.values() for row in group})
    axis.set_xscale("log", base=2)
    axis.set_xticks(seqs, [str(seq) for seq in seqs])
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("n, tokens (log scale)")
    axis.set_ylabel(f"{label} (log scale)")
    axis.grid(lw=0.4)
    axis.set_axisbelow(True)


def _colour(name: str) -> str:
    return next(c for start, c in COLOURS.items() if name.startswith(start))
