"""The table of `benchmarks.mlp --stages`."""

import textwrap
from collections.abc import Callable, Sequence

from rich.console import Console

from . import _mlp_model as shapes
from ._harness import Row
from ._mlp_report import by_model, device_percent
from ._mlp_stages import WAYS, WHOLE
from ._report import WIDTH, number, print_problems, print_table, table


def milliseconds(row: Row | None) -> float | None:
    """Of the kernels alone where that is known, as sums of small stages need it."""
    if row is None or row["status"] != "ok":
        return None
    return row.get("device_ms") or row["time_ms"]


def times(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Of one model and batch, by framework and name."""
    found = {(r["framework"], r["implementation"]): milliseconds(r) for r in rows}
    return {key: ms for key, ms in found.items() if ms is not None}


def sum_of(found: dict[tuple[str, str], float], stages: Sequence[str]) -> float | None:
    """Milliseconds of a way; None where one of its stages has no time."""
    by_name = {name: ms for (_, name), ms in found.items()}
    parts = [by_name.get(stage) for stage in stages]
    return None if None in parts else sum(ms for ms in parts if ms is not None)


def print_all(console: Console, rows: Sequence[Row], describe: Callable) -> None:
    for (model, batch), group in by_model(rows).items():
        _print_stages(console, f"{model} {batch} x {shapes.SEQ}", group)
    if any(row.get("includes_compile") for row in rows):
        console.print("* mean, without warm-up: the first call includes compile")
    text = (
        "A column adds up to its sum; dense, 2:4 and packed are XLA's ways, kernel and "
        "sparse ours. The op is one program, which may fuse stages. All results were "
        "checked against float64 before they were timed."
    )
    print(textwrap.fill(text, WIDTH))
    print_problems(console, rows, describe)


def _print_stages(console: Console, size: str, rows: Sequence[Row]) -> None:
    columns, found = WAYS, times(rows)
    on_device = any(row.get("device_ms") for row in rows)
    more = ["% floor"] if on_device else []
    device = " of the device" if on_device else ""
    title = f"Low-rank ReLU² by stages, {size}: ms{device}"
    result = table(title, ["", "ms", "± std", *more, *columns])
    for row in rows:
        if row["part"] == "stage":
            cells = _cells(row, on_device, columns)
            result.add_row(f" {row['implementation']}", *cells)
    blanks = [""] * (2 + len(more))
    sums = {way: sum_of(found, stages) for way, stages in columns.items()}
    result.add_row("[bold]sum[/bold]", *blanks, *(number(ms) for ms in sums.values()))
    whole = [found.get(WHOLE[way]) if way in WHOLE else None for way in columns]
    result.add_row("[bold]the op[/bold]", *blanks, *map(number, whole))
    print_table(console, result)


def _cells(row: Row, on_device: bool, columns) -> list[str]:
    """Its own time, and again where it is part of a way."""
    ms, name = milliseconds(row), row["implementation"]
    if ms is None:
        return [row["status"]]
    text = number(ms)
    cells = ["*" * row["includes_compile"] + text, number(row["std_ms"], 2)]
    cells += [number(device_percent(row))] if on_device else []
    return cells + [text if name in stages else "" for stages in columns.values()]
