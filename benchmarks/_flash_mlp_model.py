"""Shapes of `benchmarks.flash_mlp`, and what one H200 cannot be faster than."""

from dataclasses import dataclass

from ._h200 import floors_us as floors_of
from ._harness import BOTH, FORWARD
from ._report import published


@dataclass(frozen=True)
class Shape:
    num_heads: int
    batch: int
    head_dim: int
    hidden_dim: int

    def __str__(self) -> str:
        return str(tuple(vars(self).values()))


PUBLISHED = {
    Shape(*(int(line[name]) for name in list(line)[:4])): line
    for line in published("flash_mlp")
}
# By whom, for each pass: the columns of the published time and memory.
PUBLISHED_COLUMNS = {
    "published eager": {
        FORWARD: ("pytorch_fwd_ms", "pytorch_fwd_alloc_mb"),
        BOTH: ("pytorch_fwd_bwd_ms", "pytorch_peak_mb"),
    },
    "published fused": {
        FORWARD: ("triton_fwd_ms", "triton_fwd_alloc_mb"),
        BOTH: ("triton_fwd_bwd_ms", "triton_peak_mb"),
    },
}


def published_of(
    shape: Shape, which: str, by: str
) -> tuple[float | None, float | None]:
    """Milliseconds and MiB, where there are any."""
    line, columns = PUBLISHED.get(shape, {}), PUBLISHED_COLUMNS[by][which]
    ms, mib = (float(line[c]) if line.get(c) else None for c in columns)
    return ms, mib


def count_flops(shape: Shape, which: str) -> float:
    """FLOPs of two matmuls forward, and of four more backward; none computed again."""
    matmul = 2.0 * shape.num_heads * shape.batch * shape.head_dim * shape.hidden_dim
    return matmul * (2 if which == FORWARD else 6)


def floors_us(shape: Shape, which: str) -> dict[str, float]:
    """Floors of one H200: by matmuls, by bytes, by activations.

    The backward of a kernel that keeps nothing computes the hidden layer again: five
    matmuls. Bytes: every argument read and every result written once, two bytes each.
    """
    heads, batch, dim, hidden = vars(shape).values()
    matmul = 2.0 * heads * batch * dim * hidden
    tokens, weights, elements = (
        heads * n for n in (batch * dim, 2 * dim * hidden, batch * hidden)
    )
    if which == FORWARD:
        return floors_of(2 * matmul, 2 * (2 * tokens + weights), elements)
    return floors_of(7 * matmul, 2 * (5 * tokens + 3 * weights), 2 * elements)
