"""Shapes of `benchmarks.flash_mlp`, and what one H200 can do with them: predictions.

Nothing here is measured on a GPU. Floors follow from the data sheet; `predicted_us` is
a model of our kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from ._report import published

# Of an H200: dense bfloat16 matmuls, memory, and special function operations a second.
TENSOR_FLOPS, MEMORY_BYTES = 989e12, 4.8e12
SMS, CLOCK_HZ = 132, 1.83e9
# Of one multiprocessor, a clock: multiply-adds, special functions, bytes out of L2.
MACS, MUFU, L2_BYTES = 2048, 16, 32
MUFU_OPS = SMS * MUFU * CLOCK_HZ
FLOORS = ("tensor", "bytes", "mufu")
PASSES = ("forward", "forward+backward")

# Guesses of the model: the part of a block's bound that is reached when loads, matmuls
# and activations overlap; a block's first loads and last stores; and one launch.
OVERLAP = 0.7
BLOCK_CLOCKS = 2000
LAUNCH_US = 2.0


@dataclass(frozen=True)
class Shape:
    heads: int
    batch: int
    dim: int
    hidden: int

    def __str__(self) -> str:
        return f"({self.heads}, {self.batch}, {self.dim}, {self.hidden})"


PUBLISHED = {
    Shape(*(int(line[name]) for name in list(line)[:4])): line
    for line in published("flash_mlp")
}
# What our kernels are to take on an H200, in microseconds.
TARGETS_US = {
    Shape(32, 4096, 64, 512): dict(zip(PASSES, (43, 190), strict=True)),
    Shape(16, 2048, 64, 1024): dict(zip(PASSES, (24, 105), strict=True)),
    Shape(12, 1024, 64, 768): dict(zip(PASSES, (10, 40), strict=True)),
    Shape(8, 512, 64, 512): dict(zip(PASSES, (6, 25), strict=True)),
}


def count_flops(shape: Shape, which: str) -> float:
    """Of the matmuls: two forward, and four more backward; none computed again."""
    matmul = 2.0 * shape.heads * shape.batch * shape.dim * shape.hidden
    return matmul * (2 if which == "forward" else 6)


def floors_ms(shape: Shape, which: str) -> dict[str, float]:
    """What one H200 cannot be faster than: by matmuls, by bytes, by activations.

    The backward of a kernel that keeps nothing computes the hidden layer again: five
    matmuls. Bytes: every argument read and every result written once, two bytes each.
    """
    matmul = 2.0 * shape.heads * shape.batch * shape.dim * shape.hidden
    tokens = shape.heads * shape.batch * shape.dim
    weights = 2 * shape.heads * shape.dim * shape.hidden
    elements = shape.heads * shape.batch * shape.hidden
    matmuls, numbers, activations = 2, 2 * tokens + weights, 1
    if which == "forward+backward":
        matmuls, numbers, activations = 7, numbers + 3 * tokens + 2 * weights, 2
    return {
        "tensor": 1e3 * matmuls * matmul / TENSOR_FLOPS,
        "bytes": 1e3 * 2 * numbers / MEMORY_BYTES,
        "mufu": 1e3 * activations * elements / MUFU_OPS,
    }


class Launch(NamedTuple):
    """One kernel: its matmuls, and how many arrays a block reads or writes once."""

    matmuls: int
    held: int


# x and y; x, dy and dx; both weights and their gradients.
LAUNCHES = {"forward": Launch(2, 2), "dx": Launch(3, 3), "dw": Launch(4, 4)}
# Tokens of a block; hidden features in the weights' launch.
BLOCK_ROWS = {"forward": 128, "dx": 128, "dw": 128}


def predicted_us(
    shape: Shape, which: str, rows: Mapping[str, int] = BLOCK_ROWS
) -> float:
    """The time of our kernels on an idle H200: predicted, not measured.

    A block holds `rows` of one axis, of the tokens or, for the weights' gradients, of
    the hidden features, and walks the whole other one. With every step it computes its
    part of the hidden layer, so each launch has one activation for each element:

        launch  matmuls                      walks   through L2, of dim numbers each
        forward z, y                         hidden  w1, w2; the block's x, y
        dx      z, da, dx                    hidden  w1, w2; the block's x, dy, dx
        dw      z, da, dw1, dw2              tokens  x, dy; the block's w1, w2, dw1, dw2

    That is 9 matmuls in all where 6 would do if the hidden layer were kept. A block
    takes as long as the slowest of tensor cores, special functions and L2 over OVERLAP,
    and BLOCK_CLOCKS to begin and end. Each multiprocessor runs one block at a time, the
    last one of an axis as long as a whole one, so a launch takes ceil(blocks / SMS) of
    them, and LAUNCH_US. Above dim 128 the weights take two launches, which is not here.
    """
    total = 0.0
    for name in ("forward",) if which == "forward" else LAUNCHES:
        held, walked = shape.batch, shape.hidden
        if name == "dw":
            held, walked = walked, held
        launch, tile = LAUNCHES[name], rows[name]
        # Two bytes a number.
        moved = 2 * shape.dim * (2 * walked + launch.held * tile)
        clocks = max(
            launch.matmuls * tile * walked * shape.dim / MACS,
            tile * walked / MUFU,
            moved / L2_BYTES,
        )
        waves = ceil(shape.heads * ceil(held / tile) / SMS)
        total += 1e6 * waves * (clocks / OVERLAP + BLOCK_CLOCKS) / CLOCK_HZ + LAUNCH_US
    return total
