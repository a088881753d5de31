"""Tables of `benchmarks.attention --kernels`."""

import argparse
import io
from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Console

from . import _attention_kernels as kernels
from ._attention_kernels import BACKWARD, FORWARD, MASKED_RATE
from ._attention_model import PASSES, Dense, Task
from ._harness import Row
from ._report import WIDTH, number, print_table, table


def notes(args: argparse.Namespace) -> dict[str, str]:
    """Lines of the header; the predictions come last, since they are tables."""
    lines = {
        "computed": f"{' and '.join(PASSES[: 1 + args.backward])}, (batch, seq, heads"
        "[/key heads], dim)",
        "checked": "up to 512 queries a row, 256 of more; gradients through them",
        "FLOPs": "4 dim a pair, backward 2.5 times that; masks: of their blocks",
        "x dense": "over dense by the same; of torch flex, by mosaic_gpu",
        "aims": "for one H200; a mask's rate 0.85 of ours when dense",
        "mask": "host time to build it, once; % of one call, aimed at less than 1",
        "backward": "alone: both passes less the forward, with --backward",
        "predicted %": "of the floor; busy: of multiprocessors, by the schedule",
        "registers": "spills and shared memory: python -m benchmarks.kernels",
    }
    if not (args.on_device or args.full):
        lines["reduced"] = "sizes for a CPU; --full --list names those of a GPU"
    sizes = "our kernel on one H200, by shapes and counts alone: NOT MEASURED"
    lines["predicted"] = f"{sizes}\n\n{predicted_tables()}"
    return lines


def predicted_tables() -> str:
    """What the model of `_attention_kernels` says, as text of 80 columns."""
    console = Console(width=WIDTH, file=io.StringIO())
    tasks = kernels.tasks(True)
    dense = [task for task in tasks if isinstance(task.pattern, Dense)]
    masks = [task for task in tasks if task not in dense]
    with console.capture() as capture:
        for which in (FORWARD, BACKWARD):
            console.print(_predicted_dense(dense, which))
        for which in (FORWARD, BACKWARD):
            console.print(_predicted_masks(masks, which))
    return "\n".join(line.rstrip() for line in capture.get().strip().splitlines())


def _predicted_dense(tasks: Sequence[Task], which: str):
    columns = ["ms", "TFLOP/s", "aim", "floor", "by", "%", "busy"]
    result = table(
        f"{which}: predicted, not measured; floor in ms, by its cause", ["", *columns]
    )
    for task in tasks:
        said = kernels.prediction(task, which)
        names = "predicted_ms", "predicted_tflops", "aim_tflops", "floor_ms"
        cells = [number(said[name]) for name in names]
        cells += [said["floor_by"], *_percentages(said)]
        result.add_row(f"{said['shape']} {said['name']}", *cells)
    return result


def _percentages(said: Row) -> list[str]:
    return [number(said[name], 2) for name in ("percent_of_floor", "busy_percent")]


def _predicted_masks(tasks: Sequence[Task], which: str):
    """As dense: the rate if no block were skipped."""
    shape = tasks[0].shape.sizes
    columns = ["blocks %", "ms", "TFLOP/s", "aim", "as dense", "x dense", "aim"]
    result = table(
        f"{which}: predicted, not measured; {shape}, aim {MASKED_RATE} of dense",
        ["", *columns, "%", "busy"],
    )
    for task in tasks:
        said = kernels.prediction(task, which)
        cells = [100 * said["density"]]
        cells += [said[name] for name in ("predicted_ms", "predicted_tflops")]
        cells += [said["aim_tflops"], said["predicted_dense_tflops"]]
        aim = said["aim_speedup"]
        speedups = (
            f"{said['predicted_speedup']:.1f}",
            "-" if aim is None else f"{aim:g}",
        )
        percentages = _percentages(said)
        result.add_row(said["name"], *map(number, cells), *speedups, *percentages)
    return result


def print_rows(console: Console, rows: Sequence[Row], on_device: bool) -> None:
    """A pass after the other, each in tables of its own."""
    for which in PASSES:
        of_pass = [row for row in rows if row["pass"] == which]
        if of_pass:
            _print_rates(console, of_pass, which, on_device)
            _print_shares(console, of_pass, which)
    both = [row for row in rows if row.get("backward_ms") is not None]
    if both:
        _print_backward(console, both, on_device)


def _print(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    cells: Callable[[Row], list[str]],
) -> None:
    result = table(title, ["", *columns])
    for shape, group in groupby(rows, key=lambda row: row["shape"]):
        result.add_row(f"[bold]{shape}[/bold]")
        for row in group:
            result.add_row(f" {row['implementation']}", *cells(row))
    print_table(console, result)


def _scale(on_device: bool) -> tuple[str, float]:
    return ("TFLOP/s", 1) if on_device else ("GFLOP/s", 1e3)


def _print_rates(
    console: Console, rows: Sequence[Row], which: str, on_device: bool
) -> None:
    unit, factor = _scale(on_device)

    def rate(row: Row, name: str) -> str:
        value = row.get(name)
        return number(None if value is None else factor * value)

    def cells(row: Row) -> list[str]:
        if row["status"] != "ok":
            return [row["status"]]
        mark = "*" if row["includes_compile"] else ""
        times = [mark + number(row["time_ms"]), number(row["std_ms"], 2)]
        rates = [rate(row, name) for name in ("tflops", "dense_tflops")]
        if not on_device:
            return [*times, *rates]
        aim = number(row["aim_tflops"])
        return [*times, *rates, aim, number(row.get("percent_of_peak"))]

    columns = ["ms", "± std", unit, "as dense"]
    more = ["aim", "% peak"] if on_device else []
    title = f"{which}; as dense: if no block were skipped"
    _print(console, title, [*columns, *more], rows, cells)


def _print_shares(console: Console, rows: Sequence[Row], which: str) -> None:
    def cells(row: Row) -> list[str]:
        speedup = row.get("speedup")
        times = "-" if speedup is None else f"{speedup:.2f}"
        aim = row["aim_speedup"]
        floors = [number(row["floor_ms"]), number(row["percent_of_floor"])]
        mask = [number(row.get("mask_ms")), number(row["mask_percent"], 2)]
        return [times, "-" if aim is None else f"{aim:g}", *floors, *mask]

    columns = ["x dense", "aim", "floor ms", "% floor", "mask ms", "% step"]
    _print(console, f"{which}; floor: of an H200", columns, rows, cells)


def _print_backward(console: Console, rows: Sequence[Row], on_device: bool) -> None:
    unit, factor = _scale(on_device)

    def cells(row: Row) -> list[str]:
        rate = number(factor * row["backward_tflops"])
        aim = [number(row["backward_aim_tflops"])] if on_device else []
        return [number(row["backward_ms"]), rate, *aim]

    columns = ["ms", unit, *(["aim"] if on_device else [])]
    _print(console, f"{BACKWARD} alone", columns, rows, cells)
