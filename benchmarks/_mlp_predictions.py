"""What `benchmarks.mlp --predict` prints: nothing in it is measured."""

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from . import _mlp_break_even as break_even
from . import _mlp_model as shapes
from . import _mlp_stages as stages
from ._harness import Row
from ._mlp_model import BATCHES, KERNEL_ROWS, MODELS, PASSES
from ._report import WIDTH, Results, make_console, metadata, number, print_table, table

# Columns, in as few characters as they are told apart by.
NAMES: dict[str, str] = dict(
    zip(KERNEL_ROWS, ("gated", "ReLU²", "stat.", "2:4", "soft", "prun."), strict=True)
)
HEADER = """Predicted for one H200, in 16 bits: NOT MEASURED
  tokens      512 times the number behind the model
  gated       low-rank SwiGLU; the others are ReLU²: dense, 2:4-static, 2:4,
              2:4-soft, and with weights pruned to 2:4
  floor       by matmuls (2:4 at twice the rate) or by bytes, whichever is more
"""
STAGE_NAMES = {
    stages.FIRST: "in",
    stages.UP: "up",
    stages.ACTIVATION: "act.",
    stages.SELECT: "sel.",
    stages.PACK: "pack",
    stages.DOWN: "down",
    stages.LAST: "out",
    stages.UP_ACTIVATION: "up+",
    stages.UP_SELECT: "up24",
    stages.DOWN_SPARSE: "dn24",
}


def predictions() -> list[Row]:
    """A row for each of our kernels' rows, and for each stage."""
    rows = shapes.predictions()
    for label, model in MODELS.items():
        for batch in BATCHES:
            tokens = batch * shapes.SEQ
            for name, us in stages.predicted_us(model, tokens).items():
                labels = {"model": label, "batch": batch, "tokens": tokens}
                floors = stages.floors_us(model, tokens, name)
                rows.append(
                    labels
                    | {"part": "stage", "implementation": name, "pass": shapes.FORWARD}
                    | {"floors_us": floors, "predicted_us": us}
                )
    return rows


def main(args: argparse.Namespace) -> int:
    """The tables, and what else was asked for."""
    console = make_console()
    meta = metadata("mlp", device="one H200: predicted, not measured")
    console.print(HEADER)
    status = 0
    if args.predict:
        rows = predictions()
        _print_rows(console, [row for row in rows if "part" not in row])
        _print_stages(console, [row for row in rows if "part" in row])
        results = Results(args.json, meta)
        results.rows = rows
        status = int(not results.end(complete=True))
    points = break_even.predicted()
    break_even.print_predicted(console, points)
    if args.break_even:
        break_even.plot(console, args.break_even, points, meta, is_measured=False)
    return status


Found = Mapping[tuple[str, int, str], Row]


def _index(rows: Sequence[Row]) -> Found:
    return {(r["model"], r["batch"], r["implementation"]): r for r in rows}


def _print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Two tables a pass: our kernels and their part of the floor; XLA, and over it."""

    def ours(row: Any) -> str:
        percent = row["predicted_percent_of_floor"]
        return f"{number(row['predicted_us'])} {percent:>3.0f}"

    def xla(row: Any) -> str:
        over = row["predicted_xla_us"] / row["predicted_us"]
        return f"{number(row['predicted_xla_us'])} {over:.2f}"

    for which in PASSES:
        found = _index([row for row in rows if row["pass"] == which])
        names = [name for name in KERNEL_ROWS if which in shapes.passes(name)]
        title = f"{which}, predicted us of our kernels, % of floor"
        _print_grid(
            console, title, [f"{NAMES[n]}   %" for n in names], names, found, ours
        )
        title = f"{which}, predicted us of XLA, over ours"
        _print_grid(
            console, title, [f"{NAMES[n]}    x" for n in names], names, found, xla
        )


def _print_grid(
    console: Console,
    title: str,
    columns: Sequence[str],
    names: Sequence[str],
    found: Found,
    read: Callable[[Row | None], str],
) -> None:
    result = table(title, ["", *columns])
    for label in MODELS:
        for batch in BATCHES:
            cells = [read(found.get((label, batch, name))) for name in names]
            result.add_row(f"{label} {batch}", *cells)
    print_table(console, result)


def _print_stages(console: Console, rows: Sequence[Row]) -> None:
    title = "Stages of low-rank ReLU², forward, predicted us"
    columns = list(STAGE_NAMES.values())

    def read(row: Row | None) -> str:
        return number(None if row is None else row["predicted_us"])

    _print_grid(console, title, columns, list(STAGE_NAMES), _index(rows), read)
    text = (
        "in to out: by XLA, sel. and pack with the selection. Our kernels: up+ has "
        "ReLU² with it; up24 also selects and packs; dn24 is down on sparse tensor "
        "cores."
    )
    print(f"{textwrap.fill(text, WIDTH)}\n")
