"""Tables and plot of `benchmarks.mlp`."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from . import _mlp_model as shapes
from . import _mlp_peers as peers
from ._harness import Row
from ._report import number, print_problems, print_table, ratio, save_figure, table

PUBLISHED_ON = "PyTorch, RTX 3090, bfloat16; the 2:4 there is the static mask"
Figures = Mapping[tuple[str, int, str], float]

# Columns of the tables of quotients: whose time, over whose.
SPEED_UPS = {
    "low-rank SwiGLU": ("swiglu", "low_rank_swiglu"),
    "ReLU²": ("swiglu", "low_rank_relu2"),
    "2:4-static": ("swiglu", "low_rank_relu2 2:4-static"),
    "2:4": ("swiglu", "low_rank_relu2 2:4"),
    "2:4-soft": ("swiglu", "low_rank_relu2 2:4-soft"),
}
OF_2_4 = {
    "static, over ReLU²": ("low_rank_relu2", "low_rank_relu2 2:4-static"),
    "static, over SwiGLU": ("low_rank_swiglu", "low_rank_relu2 2:4-static"),
    "2:4, over ReLU²": ("low_rank_relu2", "low_rank_relu2 2:4"),
}
DISPLAY = {
    "swiglu": "SwiGLU",
    "low_rank_swiglu": "low-rank SwiGLU",
    "low_rank_relu2": "low-rank ReLU²",
    "low_rank_relu2 2:4-static": "  with 2:4-static",
    "low_rank_relu2 2:4": "  with 2:4",
    "low_rank_relu2 2:4-soft": "  with 2:4-soft",
    "packed_relu2": "pruned ReLU²",
    "static mask alone": "static mask alone",
    "2:4 alone": "2:4 alone",
    "2:4-soft alone": "2:4-soft alone",
}


def index_published(lines: Sequence[Mapping[str, str]]) -> Figures:
    """Milliseconds by model, batch and variant; the mask's own as one more variant."""
    figures = {}
    for line in lines:
        key = line["model"], int(line["batch_size"])
        figures[*key, line["variant"]] = float(line["time_ms"])
        if line["mask_time_ms"]:
            figures[*key, "static mask alone"] = float(line["mask_time_ms"])
    return figures


def timing_text(args: argparse.Namespace, default_calls: str) -> str:
    calls = f"{args.iterations} calls" if args.iterations else default_calls
    warmup = f"{args.warmup} warm-ups"
    if args.warmup == 0:
        warmup = "no warm-up: the first call includes compile"
    return f"{args.timing}, {calls} after {warmup}"


def notes(args: argparse.Namespace) -> dict[str, str]:
    """Lines of the header."""
    kernels = "our kernels; rows of no other name are by XLA"
    lines = {"published": PUBLISHED_ON, "mosaic_gpu": kernels}
    if args.on_device:
        lines["floor"] = "of one H200 by its data sheet, in 16 bits; of device time"
    return lines | peers.notes(args)


def print_all(console: Console, rows: Sequence[Row], describe: Callable) -> None:
    _print_times(console, rows)
    if _steady(rows):
        title = "Speed-up over full-rank SwiGLU"
        _print_quotients(console, rows, title, SPEED_UPS)
        title = "Speed-up of 2:4 over low-rank ReLU² and SwiGLU"
        _print_quotients(console, rows, title, OF_2_4)
    print_problems(console, rows, describe)


def _steady(rows: Sequence[Row]) -> list[Row]:
    """Our rows, as far as they hold a time without compilation in it."""
    ours = [r for r in rows if r["framework"] == "jaxkern" and r["status"] == "ok"]
    return [r for r in ours if not r["includes_compile"]]


def by_model(rows: Sequence[Row], *more: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row[label] for label in ("model", "batch", *more))
        groups.setdefault(key, []).append(row)
    return groups


def _print_times(console: Console, rows: Sequence[Row]) -> None:
    on_device = any(row.get("device_ms") for row in rows)
    what = rows[0]["pass"] if rows else "forward"
    rates = ["± std", "GFLOP/s", "temp MB", "comp. s"]
    if on_device:
        rates = ["±", "device", "TFLOP/s", "peak", "floor"]
    percent = "; peak, floor in %" if on_device else ""
    title = f"Milliseconds of {what}: median, spread and published{percent}"
    result = table(title, ["", "ms", *rates, "publ."])
    for (model, batch, framework), group in by_model(rows, "framework").items():
        peer = "" if framework == "jaxkern" else framework
        title = f"[bold]{model}[/bold] {batch} x {shapes.SEQ} {peer}"
        if all(row["status"] == "skipped" for row in group):
            result.add_row(title, "skipped")
            continue
        result.add_row(title)
        for row in group:
            name = f" {DISPLAY[row['implementation']]}"
            result.add_row(name, *_time_cells(row, on_device))
    print_table(console, result)
    errors = [row["error"] for row in rows if row["status"] == "ok"]
    if errors:
        console.print(
            "Checked against float64, every token, before timing: errors up to "
            f"{max(errors):.1e}\nof a token, each at most twice that of the plain form."
        )
    if any(row.get("includes_compile") for row in rows):
        console.print("* mean, without warm-up: the first call includes compile")
    console.print()


def device_percent(row: Row) -> float | None:
    """Of the floor, what the kernels alone took."""
    if not row.get("device_ms") or "floors_us" not in row:
        return None
    return shapes.percent_of_floor(row["floors_us"], 1e3 * row["device_ms"])


def _time_cells(row: Row, on_device: bool) -> list[str]:
    if row["status"] != "ok":
        return [row["status"]]
    if on_device:
        rates = [number(row.get(k)) for k in ("device_ms", "tflops", "percent_of_peak")]
        rates.append(number(device_percent(row)))
    else:
        gflops = 1e3 * row["tflops"] if "tflops" in row else None
        temp = row["temp_bytes"] / 1e6 if "temp_bytes" in row else None
        rates = [number(gflops), number(temp), number(row.get("compile_s"), 2)]
    mark = "*" if row["includes_compile"] else ""
    return [
        mark + number(row["time_ms"]),
        number(row["std_ms"], 2),
        *rates,
        number(row["published_ms"]),
    ]


def _times(group: Sequence[Row], field: str) -> dict[str, float]:
    return {r["implementation"]: r[field] for r in _steady(group) if r[field]}


def _quotient(times: Mapping[str, float], top: str, bottom: str) -> float | None:
    return times[top] / times[bottom] if {top, bottom} <= times.keys() else None


def _print_quotients(
    console: Console,
    rows: Sequence[Row],
    title: str,
    columns: Mapping[str, tuple[str, str]],
) -> None:
    published = any(row["published_ms"] for row in rows)
    title += " (published)" if published else ""
    result = table(title, ["", *columns])
    for (model, batch), group in by_model(rows).items():
        ours, theirs = _times(group, "time_ms"), _times(group, "published_ms")
        cells = [
            ratio(_quotient(ours, *pair), _quotient(theirs, *pair))
            for pair in columns.values()
        ]
        result.add_row(f"{model} {batch} x {shapes.SEQ}", *cells)
    print_table(console, result)


def plot(
    console: Console, rows: Sequence[Row], path: Path, meta: Mapping[str, Any]
) -> None:
    """Speed-up over full-rank by model, a panel a batch; published ones as diamonds."""
    rows = _steady(rows)
    if not rows:
        console.print("Nothing to draw: no row of ours has a time without compilation.")
        return
    # Only here: it is an optional package, and the table does not need it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_model(rows)
    batches = sorted({batch for _, batch in groups})
    width = 0.8 / len(SPEED_UPS)
    figure, axes = plt.subplots(
        len(batches), 1, figsize=(8, 1.2 + 2.6 * len(batches)), squeeze=False
    )
    for batch, axis in zip(batches, axes[:, 0], strict=True):
        models = [model for model, other in groups if other == batch]
        for i, (name, pair) in enumerate(SPEED_UPS.items()):
            offset = (i - (len(SPEED_UPS) - 1) / 2) * width
            for field in ("time_ms", "published_ms"):
                points = []
                for x, model in enumerate(models):
                    times = _times(groups[model, batch], field)
                    quotient = _quotient(times, *pair)
                    if quotient is not None:
                        points.append((x + offset, quotient))
                if not points:
                    continue
                xs, ys = zip(*points, strict=True)
                if field == "time_ms":
                    axis.bar(xs, ys, width, label=name, color=f"C{i}")
                else:
                    axis.plot(xs, ys, "D", color="black", mfc="white", ms=5, zorder=3)
        axis.axhline(1, color="grey", lw=0.8)
        axis.set_xticks(range(len(models)), models)
        axis.set_ylabel("speed-up over\nfull-rank SwiGLU")
        axis.set_title(f"{batch} x {shapes.SEQ} tokens", fontsize=10, loc="left")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    (diamond,) = axes[0, 0].plot([], [], "D", color="black", mfc="white", ms=5)
    figure.legend(
        [*handles, diamond],
        [*labels, "published (RTX 3090)"],
        loc="upper center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / figure.get_figheight()))
    figure.text(
        0.99, 0.005, f"{meta['device']}, {meta['dtype']}", ha="right", fontsize=7
    )
    save_figure(figure, path)
    plt.close(figure)
