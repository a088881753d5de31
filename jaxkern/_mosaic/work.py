"""The work of a matmul's launch, and the tiles that wait least for it."""

import dataclasses
from collections.abc import Sequence

from jax.experimental import pallas as pl

from .._core import device, h200
from .launch import COMPUTE
from .matmul import ROWS

# Columns of the tiles to choose from, the largest first. `matmul.py` has the times of
# each.
TILE_COLUMNS = (256, 128, 64)
# The same with two products: a warpgroup has the sums of both in its registers.
GATED_COLUMNS = (128, 64)
# Fraction of the tensor cores' rate that the loop over the contracted axis reaches.
# Fitted to single launches on an H200.
LOOP_SHARE = 0.82
# Clocks of a tile beside that loop, fitted to the same launches.
TILE_CLOCKS = 1800.0
# Clocks of a multiprocessor for each number of silu(gate) * up, fitted to the same.
GATE_CLOCKS = 0.13


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a launch: (m, depth) by (depth, n), `products` times.

    lefts: how many different left factors there are.
    moved: numbers that are written, or read beside the factors, for each number of a
        result.
    clocks: clocks of the epilogue on a multiprocessor, for each number of a result.
    density: the fraction of a dense product's multiply-adds that is computed.
    """

    m: int
    depth: int
    n: int
    products: int = 1
    lefts: int = 1
    moved: float = 1.0
    clocks: float = 0.0
    density: float = 1.0


def choose_columns(work: Work, valid: Sequence[int] = TILE_COLUMNS) -> int:
    """Return the columns of the tiles whose launch waits least, by `limits_us`.

    Of equal ones the first of `valid`, which is the largest, is chosen.
    """
    return min(valid, key=lambda columns: max(limits_us(work, columns).values()))


def limits_us(work: Work, columns: int) -> dict[str, float]:
    """Predict the microseconds that a launch waits for each resource of an H200.

    A launch takes the largest of these. "arithmetic": tiles take turns on the
    multiprocessors, and each takes its matmuls, at the rate that they reach, and then
    its epilogue. "L2": every tile reads its factors from there. Both add the time of
    what is moved beside one result. "memory": each array moves once.

    The prediction is within a tenth of what single launches took on an H200; in
    programs that keep the chip busy for long they took up to a fifth more.
    """
    rows = COMPUTE * ROWS
    tiles = pl.cdiv(work.m, rows) * pl.cdiv(work.n, columns)
    turns = pl.cdiv(tiles, device.multiprocessors())
    macs = rows * columns * work.depth * work.products * work.density
    clocks = macs / h200.MACS_PER_CLOCK / LOOP_SHARE + TILE_CLOCKS
    clocks += rows * columns * work.clocks
    step_numbers = rows * work.density * work.lefts + columns * work.products
    from_l2 = tiles * 2 * work.depth * step_numbers
    beside = 2 * max(0.0, work.moved - 1) * work.m * work.n / h200.MEMORY_BYTES_PER_US
    factors = work.m * work.density * work.lefts + work.n * work.products
    numbers = work.depth * factors + work.moved * work.m * work.n
    memory = 2 * numbers / h200.MEMORY_BYTES_PER_US / h200.MEMORY_SHARE
    return {
        "arithmetic": turns * clocks / h200.CLOCKS_PER_US + beside,
        "L2": from_l2 / h200.L2_BYTES_PER_US + beside,
        "memory": memory,
    }
