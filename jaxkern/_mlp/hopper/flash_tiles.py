"""The tile sizes of the multi-head MLP's kernels."""

from jax.experimental import pallas as pl

from ..._core import device
from ..._mosaic.base import SMEM_BYTES
from ..._mosaic.launch import WalkTiles
from ..._mosaic.matmul import SPARE_BYTES

# Rows of a held tile of one warpgroup: wgmma has 64 rows.
ROWS = 64
# Columns of a walked tile, by kernel, as (largest dim, columns). They are the largest
# that spill no registers, and were the fastest of those timed on an H200.
WALKED_COLUMNS = {
    "forward": ((128, 128), (224, 64), (256, 32)),
    "backward_x": ((64, 128), (128, 64), (256, 32)),
    "backward_w": ((96, 64), (256, 32)),
}
GATED_WALKED_COLUMNS = ((64, 64), (256, 32))
# Up to this dim an ungated forward can also hold tiles of 128 rows.
WIDE_DIM = 96
# Up to this dim both warpgroups can share the rows of a tile (`WalkTiles.split`). Their
# sums have to fit in the registers of warpgroup 0, which adds them.
SPLIT_DIM = {"forward": 128, "backward_x": 128, "backward_w": 96}
# The most walked columns of split tiles.
SPLIT_COLUMNS = 64
# The same for the backward of two inputs, which has one ring more, whose addresses take
# registers. Its dims are at most 32.
PAIR_SPLIT_COLUMNS = 32
# Bytes of a number of 16 bits.
NUMBER_BYTES = 2


def configs(kernel: str, dim: int, ups: int, inputs: int = 1) -> tuple[WalkTiles, ...]:
    """Return the tiles to choose from, the largest first.

    kernel: "forward", "backward_x" or "backward_w".
    ups: how many first matrices, two with a gate.
    inputs: how many inputs, one for all first matrices or one for each.
    """
    gated = ups == 2
    table = GATED_WALKED_COLUMNS if gated else WALKED_COLUMNS[kernel]
    columns = next(columns for largest, columns in table if dim <= largest)
    found = [WalkTiles(ROWS, columns, held=_held(kernel, dim, columns, ups, inputs))]
    if kernel == "forward" and not gated and dim <= WIDE_DIM:
        found.insert(0, WalkTiles(2 * ROWS, 64))
    if dim <= SPLIT_DIM[kernel]:
        is_pair = inputs == 2 and kernel != "forward"
        most = PAIR_SPLIT_COLUMNS if is_pair else SPLIT_COLUMNS
        found.append(WalkTiles(ROWS, min(columns, most), steps=4, split=True, held=1))
    return tuple(found)


def _held(kernel: str, dim: int, columns: int, ups: int, inputs: int) -> int:
    """The slots of held tiles: two if shared memory has room for them, else one."""
    held, walked = {
        "forward": (inputs, ups + 1),
        "backward_x": (inputs + 1, ups + 1),
        "backward_w": (ups + 1, inputs + 1),
    }[kernel]
    tiles = WalkTiles(ROWS, columns, held=2)
    rows = tiles.held * tiles.parts * held * ROWS + tiles.steps * walked * columns
    return 2 if rows * dim * NUMBER_BYTES <= SMEM_BYTES - SPARE_BYTES else 1


def weight_passes(dim: int, ups: int) -> tuple[tuple[int, ...], ...]:
    """Return the launches that make the weights' gradients, and which ones each makes.

    Weights go by number, the first matrices and then w2. A launch makes as many
    gradients as have room for their sums in registers.
    """
    names = range(ups + 1)
    together = 2 if dim <= (128 if ups == 1 else 96) else 1
    return tuple(tuple(names[i : i + together]) for i in range(0, len(names), together))


def choose_tiles(
    kernel: str, heads: int, size: int, dim: int, ups: int, inputs: int = 1
) -> WalkTiles:
    """Return the tiles with which the busiest multiprocessor computes the fewest rows.

    size: length of the axis whose tiles are held: tokens, or hidden features.
    """
    sms = device.multiprocessors()

    def rows_in_turn(config: WalkTiles) -> int:
        rows = config.rows * config.parts
        return pl.cdiv(heads * pl.cdiv(size, rows), sms) * rows

    return min(configs(kernel, dim, ups, inputs), key=rows_in_turn)
