"""Rows and tables of `benchmarks.attention --kernels`, and floors of one H200.

FLOPs are counted as the field does: 4 dim a pair forward, 2.5 times that backward,
though our launches compute 7 or 8 matmuls for these 5. A causal row has half the pairs,
a mask all those of its blocks of 128.
"""

import argparse
from collections.abc import Iterator, Sequence

from . import _attention_programs as programs
from . import _report as report
from . import _torch
from ._attention_model import Blocks, Dense, Shape, Task, known_mask
from ._attention_programs import CUDNN, FLEX, Entry
from ._h200 import floors_us as floors_of
from ._h200 import percent_of_floor
from ._harness import BACKWARD, BOTH, FORWARD, KERNEL, XLA, Program, Row, Skip

# FLOPs of a pass over those of the forward.
FLOPS_OF_A_PAIR = {FORWARD: 1, BACKWARD: 2.5, BOTH: 3.5}
DENSE_SHAPES = (
    Shape(4, 4096, 16, 128),
    Shape(2, 8192, 16, 128),
    Shape(1, 16384, 16, 128),
    Shape(4, 4096, 32, 64),
    Shape(4, 4096, 8, 256),
    Shape(32, 4096, 32, 128, group=4),
)
MASKED_SHAPE = Shape(1, 16384, 16, 128)
RULES = ("window", "global+local", "documents")
DENSITIES = (5, 10, 25, 50, 100)
# On a CPU, unless all are asked for.
SMALL_SHAPES = Shape(1, 512, 4, 64), Shape(1, 512, 4, 64, group=2)
SMALL_DENSITIES = (10,)
# XLA computes the blocks of a mask's heads one after the other: of more blocks than
# this it takes seconds a call, and minutes a row.
XLA_ITERATIONS, XLA_MOST_BLOCKS = 3, 2**15
DENSE_PEERS = (CUDNN, "tokamax", "torch sdpa")


def tasks(full: bool) -> list[Task]:
    """All tasks, or the few small ones for a CPU."""
    shapes = DENSE_SHAPES if full else SMALL_SHAPES
    masked = MASKED_SHAPE if full else SMALL_SHAPES[0]
    dense = [Task(s, Dense(causal)) for s in shapes for causal in (False, True)]
    drawn = DENSITIES if full else SMALL_DENSITIES
    masks = [*(Blocks(d, masked.heads) for d in drawn), *map(Blocks, RULES)]
    return dense + [Task(masked, mask) for mask in masks]


def entries(args: argparse.Namespace) -> list[Entry]:
    """Ours by both implementations, and the peers that can compute the same."""
    rows = []
    for task in tasks(args.on_device or args.full):
        op, peers = "block_sparse_attention", (FLEX,)
        if isinstance(task.pattern, Dense):
            op, peers = "attention", DENSE_PEERS
        by = KERNEL, XLA, *_torch.present(peers, args)
        rows += [Entry("kernels", op, task, who) for who in by]
    return rows


def build(entry: Entry, args: argparse.Namespace) -> Program:
    """As `programs.build`; XLA's long rows only where they are asked for."""
    if entry.by == XLA and isinstance(entry.task.pattern, Blocks) and not args.full:
        mask = known_mask(entry.task.pattern, entry.task.shape.seq)
        count = round(mask.density * mask.shape[1] * mask.grid[0] * mask.grid[1])
        if count > XLA_MOST_BLOCKS:
            raise Skip(
                f"xla computes {count} blocks one after the other, more than "
                f"{XLA_MOST_BLOCKS}: --full measures it"
            )
    return programs.build(entry, args)


def floors_us(shape: Shape, which: str, flops: float) -> dict[str, float]:
    """Floors of one H200: by matmuls, by bytes, by exp2.

    Bytes: every argument read and every result written once. A backward that keeps no
    weights computes them again: five matmuls, and an exp2 more.

    flops: of the pass, from which follow the pairs that attend.
    """
    pairs = flops / (4 * shape.dim * FLOPS_OF_A_PAIR[which])
    # So many arrays like the query and like the key, in 16 bits.
    arrays = 2 if which == FORWARD else 4
    heads = arrays * (shape.heads + shape.kv_heads)
    moved = 2.0 * shape.batch * shape.seq * shape.dim * heads
    return floors_of(flops, moved, (2 if which == BOTH else 1) * pairs)


def time_of(row: Row | None) -> float | None:
    """Milliseconds of the kernels alone where they are known, as rates have them."""
    if row is None or row["status"] != "ok":
        return None
    return row[row["rate_from"]]


def speed_up(rows: Sequence[Row], row: Row) -> float | None:
    """Over the dense row of the same shape and pass.

    It is computed by the same; that of a peer's mask, by our kernel.
    """
    by = KERNEL if row["by"] == FLEX else row["by"]
    dense = report.grouped(rows, "variant", "by", "shape", "pass")
    first, *_ = dense.get(("dense", by, row["shape"], row["pass"]), [None])
    return report.over(time_of(first), time_of(row))


def floor_percent(row: Row) -> float | None:
    floors = floors_us(Shape.of(row), row["pass"], row["flops"])
    return percent_of_floor(row | {"floors_us": floors})


def _name(row: Row) -> str:
    return f"{row['variant']} {row['by'].removeprefix('jaxkern ')}"


def _shape(row: Row) -> str:
    return row["shape"]


def tables(rows: Sequence[Row]) -> Iterator[report.Table]:
    """Rates of each pass, then the backward alone."""
    for (which,), group in report.grouped(rows, "pass").items():
        yield _rates(group, which)
    alone = backward_rows(rows)
    if alone:
        columns = {"ms": report.field("time_ms")} | report.rate(alone)
        yield report.listing("backward alone", alone, _name, columns, _shape)


def _rates(rows: Sequence[Row], which: str) -> report.Table:
    factor = 1 if report.on_gpu(rows) else 1e3

    def as_dense(row: Row) -> str:
        flops = Task(Shape.of(row), Dense()).flops(which)
        rate = report.over(flops, time_of(row))
        return report.number(rate and factor * rate / 1e9)

    columns = report.times(rows) | {"as dense": as_dense}
    columns["x dense"] = lambda row: report.ratio(speed_up(rows, row))
    columns["mask ms"] = report.field("mask_ms")
    if report.on_gpu(rows):
        columns["% floor"] = lambda row: report.number(floor_percent(row))
    return report.listing(which, rows, _name, columns, _shape)


def backward_rows(rows: Sequence[Row]) -> list[Row]:
    """The backward alone, where both passes and the forward were measured."""
    found = []
    for group in report.grouped(rows, "shape", "op", "variant", "by").values():
        of_pass = {row["pass"]: row for row in group}
        forward, both = (time_of(of_pass.get(which)) for which in (FORWARD, BOTH))
        if forward and both and both > forward:
            # 2.5 of the 3.5 times that both passes have of the forward's.
            flops, ms = of_pass[BOTH]["flops"] * 2.5 / 3.5, both - forward
            rate = {"time_ms": ms, "tflops": flops / ms / 1e9}
            found.append(of_pass[BOTH] | rate)
    return found
