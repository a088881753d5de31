"""Rows of `benchmarks.attention --kernels`, and what one H200 can do with them.

Nothing here is measured. `floors_ms` follows from the data sheet; `predicted_ms` is a
model of the kernel from shapes and counts of blocks alone. It assumes:

- A block computes 2 x 64 rows and walks `config_of(...).columns` at a step. It takes as
  long as its matmuls (2 forward; 3 in the launch for the queries' gradient; 4 in the
  one for keys and values, above dim 128 3 + 2 in two launches) or its exp2, one a logit
  and launch, whichever is more: two warpgroups hide one under the other.
- Both run at 0.7 of the chip's rate, and up to dim 64, where they take equally long, at
  half of it. That covers the rest of the softmax (maximum, sum, scale, rounding),
  partial blocks' predicates and the barriers. Launches of an H200 reached 0.67 to 0.73
  at dims 128 and 256, and 0.46 to 0.54 at dim 64.
- A launch takes as long as the multiprocessor to which the kernel's schedule gives the
  most blocks; at least as long as the tiles of all steps take from L2, or as each array
  takes once to or from memory, at 0.7 of its rate; and 2 us. The backward also reads
  three arrays for the sum of d_out * out.
- The schedule takes no time: a row's mask is known where its program is traced, and its
  schedule then is constant. A mask that jit traces takes about 100 us more a launch.

FLOPs are counted as the field does: 4 dim a pair forward, 2.5 times that backward,
though our launches compute 7 or 8 matmuls for these 5. A causal row has half the pairs,
a mask all those of its blocks of 128.
"""

import argparse
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from jaxkern import BlockMask
from jaxkern._attention.hopper import attend, schedule
from jaxkern._core import h200 as h200
from jaxkern._core.device import MULTIPROCESSORS

from . import _attention_programs as programs
from ._attention_model import BLOCK, PASSES, Dense, Masked, Shape, Task, known_mask
from ._attention_programs import FLEX, Entry
from ._harness import Program, Row, Skip
from ._mlp_cost import MUFU_PER_CLOCK

FORWARD, BOTH = PASSES
BACKWARD = "backward"
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
DENSE_PEERS = ("jax.nn cudnn", "tokamax", "torch sdpa")

# Of the chip's rate, and up to which dim it is the smaller one.
RATE, NARROW_RATE, NARROW = 0.7, 0.5, 64
# What dense attention is to reach on an H200, in TFLOP/s: full, and causal.
AIMS = {
    (64, FORWARD): (510, 410),
    (64, BACKWARD): (350, 290),
    (128, FORWARD): (650, 570),
    (128, BACKWARD): (480, 410),
    (256, BACKWARD): (210, 210),
}
# A mask's rate over the dense one's; and how many times as fast, where that is named.
MASKED_RATE = 0.85
SPEEDUPS = {10: 8.0}


def tasks(full: bool) -> list[Task]:
    """What is computed; on a CPU a few small ones instead of all."""
    shapes = DENSE_SHAPES if full else SMALL_SHAPES
    masked = MASKED_SHAPE if full else SMALL_SHAPES[0]
    dense = [Task(s, Dense(causal)) for s in shapes for causal in (False, True)]
    drawn = DENSITIES if full else SMALL_DENSITIES
    masks = [*(Masked(d, masked.heads) for d in drawn), *map(Masked, RULES)]
    return dense + [Task(masked, mask) for mask in masks]


def name_of(task: Task) -> str:
    if isinstance(task.pattern, Dense):
        return "causal" if task.pattern.is_causal else "dense"
    return str(task.pattern)


def entries(args: argparse.Namespace) -> list[Entry]:
    """Ours by both implementations, and the peers that can compute the same."""
    rows = []
    for task in tasks(args.on_device or args.full):
        peers = DENSE_PEERS if isinstance(task.pattern, Dense) else (FLEX,)
        others = [p for p in peers if programs.why_left_out(p, args) is None]
        for by in (*programs.IMPLEMENTATIONS, *others):
            rows.append(Entry("kernels", f"{name_of(task)} {by}", task, by))
    return rows


def build(entry: Entry, args: argparse.Namespace) -> Program:
    """As `programs.build`; XLA's long rows only where they are asked for."""
    if entry.by == "xla" and isinstance(entry.task.pattern, Masked) and not args.full:
        mask = known_mask(entry.task.pattern, entry.task.shape.seq)
        count = round(mask.density * mask.shape[1] * mask.grid[0] * mask.grid[1])
        if count > XLA_MOST_BLOCKS:
            raise Skip(
                f"xla computes {count} blocks one after the other, more than "
                f"{XLA_MOST_BLOCKS}: --full measures it"
            )
    return programs.build(entry, args)


def aim_tflops(task: Task, which: str) -> float | None:
    """Of a dense row; of both passes it follows from that of each."""
    if not isinstance(task.pattern, Dense):
        return None
    if which != BOTH:
        aims = AIMS.get((task.shape.dim, which))
        return None if aims is None else float(aims[task.pattern.is_causal])
    forward, backward = (aim_tflops(task, x) for x in (FORWARD, BACKWARD))
    if forward is None or backward is None:
        return None
    return 3.5 / (1 / forward + 2.5 / backward)


def flops(task: Task, which: str) -> float:
    if which == BACKWARD:
        return task.flops(BOTH) - task.flops(FORWARD)
    return task.flops(which)


def dense_of(task: Task) -> Task:
    return Task(task.shape, Dense())


def _tokens_bytes(shape: Shape, queries: int, keys: int) -> float:
    """Of so many arrays like the query and like the key, two bytes a number."""
    heads = queries * shape.heads + keys * shape.kv_heads
    return 2.0 * shape.batch * shape.seq * shape.dim * heads


def floors_ms(task: Task, which: str) -> dict[str, float]:
    """What no H200 can be faster than: by matmuls, by bytes, by exp2.

    Bytes: every argument read and every result written once. A backward that keeps no
    weights computes them again: five matmuls, and an exp2 more.
    """
    s = task.shape
    pairs = s.batch * s.heads * task.pattern.pairs(s.seq, s.heads)
    arrays = {FORWARD: (2, 2), BACKWARD: (4, 4), BOTH: (4, 4)}[which]
    exps = 2 if which == BOTH else 1
    clocks = MULTIPROCESSORS * h200.CLOCKS_PER_US
    us = {
        "tensor": flops(task, which) / (2 * h200.MACS_PER_CLOCK * clocks),
        "mufu": exps * pairs / (MUFU_PER_CLOCK * clocks),
        "bytes": _tokens_bytes(s, *arrays) / h200.MEMORY_BYTES_PER_US,
    }
    return {name: time / 1e3 for name, time in us.items()}


def launches(dim: int, which: str) -> Iterator[tuple[str, int, str, tuple[int, int]]]:
    """Kernel, matmuls a step, lists that are walked, and arrays that are moved once.

    The arrays are those like the query and those like the key.
    """
    if which != BACKWARD:
        yield "forward", 2, "kv", (2, 2)
    if which != FORWARD:
        yield "backward_q", 3, "kv", (3, 2)
        for wanted in attend.kv_launches(dim):
            products = 1 + ("value" in wanted) + 2 * ("key" in wanted)
            yield "backward_kv", products, "q", (2, 2 + len(wanted))


@lru_cache
def row_lengths(task: Task, side: str) -> np.ndarray:
    """Blocks that each held tile of 128 rows walks."""
    s = task.shape
    mask = _mask_of(task)
    counts = sum(
        np.asarray(getattr(mask, name).num_blocks) for name in (side, f"full_{side}")
    )
    counts = np.broadcast_to(counts, (s.batch, s.heads, s.seq // BLOCK))
    if side == "q":
        grouped = s.batch, s.kv_heads, s.group, s.seq // BLOCK
        counts = counts.reshape(grouped).sum(2)
    return counts.ravel()


def _mask_of(task: Task) -> BlockMask:
    pattern, seq = task.pattern, task.shape.seq
    if isinstance(pattern, Masked):
        return known_mask(pattern, seq)
    if task == dense_of(task):
        return BlockMask.local_window(seq, seq, window=seq, block_size=BLOCK)
    return BlockMask.causal(seq, seq, block_size=BLOCK)


def busiest(lengths: np.ndarray) -> int:
    """The most blocks that the kernel's schedule gives to one multiprocessor."""
    falling = -np.sort(-lengths)
    cost = falling + schedule.STEPS_OF_A_TILE
    block = schedule.assign(cost, min(MULTIPROCESSORS, len(lengths)))
    return int(np.bincount(np.asarray(block), falling).max())


def predict_launch(
    task: Task, kernel: str, products: int, side: str, arrays: tuple[int, int]
) -> dict[str, Any]:
    """Microseconds by what could be the limit; predicted, not measured."""
    dim = task.shape.dim
    config = attend.config_of(kernel, dim, BLOCK)
    lengths = row_lengths(task, side)
    most = busiest(lengths)
    rows, steps = 2 * config.rows, BLOCK // config.columns
    logits = rows * config.columns
    reached = h200.CLOCKS_PER_US * (RATE if dim > NARROW else NARROW_RATE)
    loaded = config.columns * dim * 2 * 2
    times = {
        "tensor": most
        * steps
        * logits
        * products
        * dim
        / h200.MACS_PER_CLOCK
        / reached,
        "mufu": most * steps * logits / MUFU_PER_CLOCK / reached,
        "L2": int(lengths.sum()) * steps * loaded / h200.L2_BYTES_PER_US,
        "memory": _tokens_bytes(task.shape, *arrays)
        / (h200.MEMORY_BYTES_PER_US * h200.MEMORY_SHARE),
    }
    limit = max(times, key=times.__getitem__)
    sizes: dict[str, Any] = {
        "kernel": kernel,
        "columns": config.columns,
        "matmuls": products,
    }
    sizes["busy_percent"] = 100 * int(lengths.sum()) / (most * MULTIPROCESSORS)
    return {**sizes, "limit": limit, "us": h200.LAUNCH_US + times[limit]}


@lru_cache
def predicted_ms(task: Task, which: str) -> float:
    """Of all launches, on an idle H200: predicted, not measured."""
    us = sum(predict_launch(task, *x)["us"] for x in launches(task.shape.dim, which))
    if which != FORWARD:
        us += h200.LAUNCH_US
        us += _tokens_bytes(task.shape, 3, 0) / (
            h200.MEMORY_BYTES_PER_US * h200.MEMORY_SHARE
        )
    return us / 1e3


def prediction(task: Task, which: str) -> dict[str, Any]:
    """All there is to say about a row before anything is measured."""
    time, dense = predicted_ms(task, which), dense_of(task)
    dense_ms, dense_flops = predicted_ms(dense, which), flops(dense, which)
    floors, aim = floors_ms(task, which), aim_tflops(task, which)
    if isinstance(task.pattern, Masked):
        aim = MASKED_RATE * dense_flops / dense_ms / 1e9
    steps = [predict_launch(task, *x) for x in launches(task.shape.dim, which)]
    seq = task.shape.seq
    return {
        "shape": task.shape.sizes,
        "name": name_of(task),
        "pass": which,
        "density": task.pattern.pairs(seq, task.shape.heads) / float(seq) ** 2,
        "predicted_ms": time,
        "predicted_tflops": flops(task, which) / time / 1e9,
        "predicted_dense_tflops": dense_flops / time / 1e9,
        "predicted_speedup": dense_ms / time,
        "floors_ms": floors,
        "floor_ms": max(floors.values()),
        "floor_by": max(floors, key=floors.__getitem__),
        "percent_of_floor": 100 * max(floors.values()) / time,
        "aim_tflops": aim,
        "aim_speedup": aim_speedup(task),
        "busy_percent": min(x["busy_percent"] for x in steps),
        "launches": steps,
    }


def aim_speedup(task: Task) -> float | None:
    """How many times as fast as dense a mask is to be, where that was named."""
    which = getattr(task.pattern, "which", None)
    return SPEEDUPS.get(which) if isinstance(which, int) else None


def predictions() -> list[dict[str, Any]]:
    """Of the rows as they are on a GPU, whatever this machine is."""
    passes = FORWARD, BACKWARD
    return [prediction(task, which) for task in tasks(True) for which in passes]


BACKWARD_FIGURES = "backward_ms", "backward_tflops", "backward_aim_tflops"
# By shape, implementation and pass.
Rows = Mapping[tuple[str, str, str], Row]


def add_figures(
    rows: list[Row], tasks: dict[tuple[str, str], Task], on_device: bool
) -> None:
    """What follows from a row's shape and from other rows of the run.

    tasks: by `shape` and `implementation` of a row.
    """
    found = {(r["shape"], r["implementation"], r["pass"]): r for r in rows}
    for row in rows:
        task, which = tasks[row["shape"], row["implementation"]], row["pass"]
        floors = floors_ms(task, which)
        row |= {"floors_ms": floors, "floor_ms": max(floors.values())}
        row |= {"flops_dense": flops(dense_of(task), which)}
        row |= {"aim_tflops": aim_tflops(task, which), "aim_speedup": aim_speedup(task)}
        row |= dict.fromkeys(("dense_tflops", "percent_of_floor", "speedup"))
        row |= dict.fromkeys(("mask_percent", "predicted_ms", *BACKWARD_FIGURES))
        if row["by"] == "mosaic_gpu":
            row["predicted_ms"] = predicted_ms(task, which)
        time, dense_ms = (
            time_of(found, row["shape"], name, which)
            for name in (row["implementation"], f"dense {_compared(row['by'])}")
        )
        if isinstance(task.pattern, Masked) and dense_ms:
            row["aim_tflops"] = MASKED_RATE * row["flops_dense"] / dense_ms / 1e9
        if time is None:
            continue
        row["dense_tflops"] = row["flops_dense"] / time / 1e9
        if dense_ms:
            row["speedup"] = dense_ms / time
        if on_device:
            row["percent_of_floor"] = 100 * row["floor_ms"] / time
        if "mask_ms" in row:
            row["mask_percent"] = 100 * row["mask_ms"] / time
        if which == BOTH:
            row |= _backward_figures(found, row, task)


def _compared(by: str) -> str:
    """Whose dense row another one is over: its own, a peer's mask over our kernel's."""
    return by if by in programs.IMPLEMENTATIONS or by in DENSE_PEERS else "mosaic_gpu"


def _backward_figures(found: Rows, row: Row, task: Task) -> Row:
    """Of the backward alone, where both passes and the forward were measured."""
    time, dense_ms = (
        time_of(found, row["shape"], name, BACKWARD)
        for name in (row["implementation"], f"dense {_compared(row['by'])}")
    )
    if time is None:
        return {}
    aim = aim_tflops(task, BACKWARD)
    if isinstance(task.pattern, Masked) and dense_ms:
        aim = MASKED_RATE * flops(dense_of(task), BACKWARD) / dense_ms / 1e9
    figures = time, flops(task, BACKWARD) / time / 1e9, aim
    return dict(zip(BACKWARD_FIGURES, figures, strict=True))


def time_of(found: Rows, shape: str, name: str, which: str) -> float | None:
    """Of the kernels alone where it is known, which is what rates are of.

    The backward's is what both passes take, less what the forward takes.
    """
    if which == BACKWARD:
        forward, both = (time_of(found, shape, name, x) for x in PASSES)
        return both - forward if forward and both and both > forward else None
    row = found.get((shape, name, which))
    return row[row["rate_from"]] if row and row["status"] == "ok" else None
