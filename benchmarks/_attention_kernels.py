"""Rows of `benchmarks.attention --kernels`, and what one H200 cannot be faster than.

FLOPs are counted as the field does: 4 dim a pair forward, 2.5 times that backward,
though our launches compute 7 or 8 matmuls for these 5. A causal row has half the pairs,
a mask all those of its blocks of 128.
"""

import argparse

from . import _attention_programs as programs
from . import _torch
from ._attention_model import Blocks, Dense, Shape, Task, known_mask
from ._attention_programs import CUDNN, FLEX, Entry
from ._h200 import floors_us as floors_of
from ._harness import BACKWARD, BOTH, FORWARD, KERNEL, XLA, Program, Skip

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
        peers = DENSE_PEERS if isinstance(task.pattern, Dense) else (FLEX,)
        others = _torch.present(peers, args)
        is_dense = isinstance(task.pattern, Dense)
        op = "attention" if is_dense else "block_sparse_attention"
        rows += [Entry("kernels", op, task, by) for by in (KERNEL, XLA, *others)]
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


def _tokens_bytes(shape: Shape, queries: int, keys: int) -> float:
    """Bytes of so many arrays like the query and like the key, in 16 bits."""
    heads = queries * shape.heads + keys * shape.kv_heads
    return 2.0 * shape.batch * shape.seq * shape.dim * heads


def floors_us(shape: Shape, which: str, flops: float) -> dict[str, float]:
    """Floors of one H200: by matmuls, by bytes, by exp2.

    Bytes: every argument read and every result written once. A backward that keeps no
    weights computes them again: five matmuls, and an exp2 more.

    flops: of the pass, from which follow the pairs that attend.
    """
    pairs = flops / (4 * shape.dim * FLOPS_OF_A_PAIR[which])
    arrays = 2 if which == FORWARD else 4
    exps = 2 if which == BOTH else 1
    return floors_of(flops, _tokens_bytes(shape, arrays, arrays), exps * pairs)
