"""Shapes of `benchmarks.flash_mlp`, and what one H200 can do with them: predictions.

Nothing here is measured on a GPU. Floors follow from the data sheet; and `predicted_us`
adds up what the kernels' own model says.
"""

from dataclasses import dataclass

from jaxkern._core import device, h200

from . import _mlp_cost as cost
from ._report import published

# Of one H200's dense matmuls of 16-bit numbers, by its data sheet.
TENSOR_FLOPS_PER_S = 989e12
MEMORY_BYTES_PER_S = 1e6 * h200.MEMORY_BYTES_PER_US
# Special function operations of all multiprocessors.
MUFU_PER_S = 1e6 * device.MULTIPROCESSORS * cost.MUFU_PER_CLOCK * h200.CLOCKS_PER_US
FLOORS = ("tensor", "bytes", "mufu")
PASSES = ("forward", "forward+backward")


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
        "tensor": 1e3 * matmuls * matmul / TENSOR_FLOPS_PER_S,
        "bytes": 1e3 * 2 * numbers / MEMORY_BYTES_PER_S,
        "mufu": 1e3 * activations * elements / MUFU_PER_S,
    }


def predicted_us(shape: Shape, which: str) -> float:
    """The time of our kernels' launches on an idle H200: predicted, not measured."""
    layer = cost.Layer(
        shape.batch, shape.dim, shape.hidden, shape.dim, heads=shape.heads
    )
    return cost.flash_us(layer, backward=which == "forward+backward")
