"""Predicted times of an MLP on an H200, by each way to compute it.

A kernel takes as long as its launches wait for matmuls, L2 or memory. A matmul of XLA
takes as long as the tensor cores or the memory do at the rates that it reaches there,
whichever is longer; each of its elementwise programs reads and writes its arrays once.
The thresholds of `jaxkern._mlp.thresholds` stand for what is predicted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks import _mlp_model as shapes
from benchmarks._h200 import MUFU_PER_CLOCK
from benchmarks._mlp_model import SOFT, SWIGLU, TOP2, Model
from jaxkern._core import device, h200
from jaxkern._mlp.hopper import flash, flash_tiles, fused, sparse
from jaxkern._mlp.thresholds import FEATURE_STEP, DenseKernel, dense_kernel
from jaxkern._mosaic.base import round_up
from jaxkern._mosaic.launch import ROW_STEP
from jaxkern._mosaic.work import (
    GATED_COLUMNS,
    TILE_COLUMNS,
    Work,
    choose_columns,
    limits_us,
)
from jaxkern._sparsity.hopper.product import SPARSE_DENSITY

# Share of the tensor cores' rate that our matmul kernels reach at 16384 x 1024 x 16512.
MATMUL_SHARE = 0.74
# The same for XLA's matmuls (cuBLAS).
XLA_MATMUL_SHARE = 0.79
Kernel = DenseKernel | Literal["sparse"]
# How much faster a kernel must be predicted to be, to be picked. Single launches are
# predicted within a tenth; sparse ones wait in each step, which is not modelled, and
# fell shorter.
MARGIN = {"flash_mlp": 0.95, "matmul": 0.95, "sparse": 0.9}
# Numbers that XLA's programs read and write to select, for each hidden feature, beside
# what they do for ReLU² alone: two of four, forward, and forward and backward.
TOP2_NUMBERS = (0.0, 1.7)
# The same of S-STE's, either way.
SOFT_NUMBERS = 7.5
# Two in four 16-bit numbers are stored as they are, with their positions.
PACKED = sparse.PACKED_NUMBERS


@dataclass(frozen=True)
class Layer:
    """(tokens, rank_in) -> hidden -> (tokens, rank_out).

    products: two if gated, and `lefts` if they have one input each.
    heads: as many such layers side by side.
    """

    tokens: int
    rank_in: int
    hidden: int
    rank_out: int
    products: int = 1
    lefts: int = 1
    heads: int = 1

    @property
    def ranks(self) -> tuple[int, int]:
        return self.rank_in, self.rank_out


def xla_matmul_us(m: int, depth: int, n: int, heads: int = 1) -> float:
    """Predicted time of XLA's matmul of 16-bit numbers, or of one for each head."""
    macs_per_us = h200.MACS_PER_CLOCK * device.multiprocessors() * h200.CLOCKS_PER_US
    computed = m * depth * n / (macs_per_us * XLA_MATMUL_SHARE)
    moved = _moved_us(m * depth + depth * n + m * n)
    return h200.LAUNCH_US + heads * max(computed, moved)


def _moved_us(numbers: float) -> float:
    """Predicted time to read or write so many 16-bit numbers."""
    return 2 * numbers / (h200.MEMORY_BYTES_PER_US * h200.MEMORY_SHARE)


def elementwise_us(numbers: int | float, launches: int = 1) -> float:
    """Predicted time of launches that read and write so many 16-bit numbers."""
    return _moved_us(numbers) + launches * h200.LAUNCH_US


def padding_us(tokens: int, ranks: Sequence[int], hidden: int, products: int) -> float:
    """Predicted time of the copies that pad weights and cores."""
    numbers = copies = 0
    if hidden % FEATURE_STEP or any(rank % FEATURE_STEP for rank in ranks):
        numbers += (products * ranks[0] + ranks[1]) * hidden
        copies += products + 1
    if tokens % ROW_STEP or any(rank % FEATURE_STEP for rank in ranks):
        numbers += tokens * (products * ranks[0] + ranks[1])
        copies += 2
    return elementwise_us(2 * numbers, copies)


def launch_us(work: Work, valid: Sequence[int] = TILE_COLUMNS) -> float:
    """Predicted time of a matmul kernel with the tiles that it chooses."""
    limits = limits_us(work, choose_columns(work, valid))
    return h200.LAUNCH_US + max(limits.values())


def _columns(layer: Layer) -> Sequence[int]:
    """The tiles that there are for this layer's products."""
    return TILE_COLUMNS if layer.products == 1 else GATED_COLUMNS


def _whole(layer: Layer) -> Layer:
    """With as many hidden features as the matmul kernels make."""
    return replace(layer, hidden=round_up(layer.hidden, FEATURE_STEP))


def _gradient_matmuls_us(layer: Layer) -> float:
    """Predicted time of XLA's backward matmuls for inputs and weights.

    That of the hidden features' gradient is counted by the caller.
    """
    t, w, heads = layer.tokens, layer.hidden, layer.heads
    us = layer.products * xla_matmul_us(t, w, layer.rank_in, heads)
    us += layer.products * xla_matmul_us(layer.rank_in, t, w, heads)
    # The inputs' gradients of two products are joined or added.
    us += (layer.products - 1) * elementwise_us(4 * heads * t * layer.rank_in)
    return us + xla_matmul_us(w, t, layer.rank_out, heads)


def gradients_us(layer: Layer) -> float:
    """Predicted backward of the matmul kernels, which leave all but one to XLA."""
    layer = _whole(layer)
    moved = 2.0 * layer.products
    work = Work(layer.tokens, layer.rank_out, layer.hidden, moved=moved)
    return launch_us(work, _columns(layer)) + _gradient_matmuls_us(layer)


def matmul_us(layer: Layer, backward: bool) -> float:
    """Predicted time of the matmul kernels, forward or forward and backward."""
    us = padding_us(layer.tokens, layer.ranks, layer.hidden, layer.products)
    layer = _whole(layer)
    t, w = layer.tokens, layer.hidden
    us += xla_matmul_us(t, w, layer.rank_out)
    if layer.products == 1:
        work = Work(t, layer.rank_in, w)
    else:
        outs = 3 if backward else 1
        work = fused.gate_work(t, layer.rank_in, w, layer.lefts, outs)
    us += launch_us(work, _columns(layer))
    return us + (gradients_us(layer) if backward else 0.0)


def select_us(
    tokens: int, rank: int, hidden: int, shrink: bool = False, keep: bool = False
) -> float:
    """Predicted time of the matmul that selects, packs and, to `keep`, writes all."""
    clocks = sparse.SHRINK_CLOCKS if shrink else sparse.SELECT_CLOCKS
    moved = PACKED + 1 if keep else PACKED
    work = Work(tokens, rank, hidden, moved=moved, clocks=clocks)
    return launch_us(work, sparse.SELECT_COLUMNS)


def sparse_matmul_us(m: int, depth: int, n: int) -> float:
    """Predicted time of a packed matrix times a dense one."""
    return launch_us(Work(m, depth, n, density=SPARSE_DENSITY))


def sparse_us(
    layer: Layer, backward: bool, soft: bool = False, keep: bool = False
) -> float:
    """Predicted time of the kernels that select 2:4; as `matmul_us`.

    soft: they select by S-STE, which keeps all hidden features for the backward;
        others do so if `keep`.
    """
    us = padding_us(layer.tokens, layer.ranks, layer.hidden, layer.products)
    t, w, rank = layer.tokens, _whole(layer).hidden, layer.rank_out
    keep = (soft or keep) and backward
    us += select_us(t, layer.rank_in, w, shrink=soft, keep=keep)
    us += sparse_matmul_us(t, w, rank)
    if soft:
        # The scale, of the sums of each tile, multiplies the result.
        us += elementwise_us(2 * t * rank, 2)
    if backward:
        us += gradients_us(layer) + elementwise_us((1 + PACKED) * t * w)
    return us


def _flash_launch_us(
    kernel: str, layer: Layer, held: int, walked: int, sums: int = 1
) -> float:
    """Predicted time of one launch of `flash_mlp`: within a fourth of what they took.

    Tiles take turns on the multiprocessors. One takes as long as its matmuls and its
    activations, of which little is hidden (silu takes 43 us where relu takes 31); all
    together no less than the walked tiles take to come from L2, and every array to and
    from memory. 2 us pass before the first tile and after the last one.

    held, walked: sizes of the held and of the walked axis.
    sums: how many gradients a launch for the weights makes.
    """
    heads, dim, ups, inputs = layer.heads, layer.rank_in, layer.products, layer.lefts
    config = flash_tiles.choose_tiles(kernel, heads, held, dim, ups, inputs)
    rows = config.rows * config.parts
    blocks = heads * -(-held // rows)
    turns = -(-blocks // device.multiprocessors())
    products, walked_arrays, held_arrays = {
        "forward": (ups + 1, ups + 1, inputs + 1),
        "backward_x": (2 * ups + 1, ups + 1, 2 * inputs + 1),
        "backward_w": (ups + 1 + sums, inputs + 1, ups + 1 + sums),
    }[kernel]
    matmuls = products * dim / h200.MACS_PER_CLOCK / MATMUL_SHARE
    clocks = rows * walked * (matmuls + 1 / MUFU_PER_CLOCK)
    computed = turns * clocks / h200.CLOCKS_PER_US
    from_l2 = 2 * blocks * walked_arrays * walked * dim / h200.L2_BYTES_PER_US
    numbers = heads * dim * (held_arrays * held + walked_arrays * walked)
    return h200.LAUNCH_US + max(computed, from_l2, _moved_us(numbers))


def _flash_padding_us(layer: Layer) -> float:
    """Predicted time of the copies that `flash_mlp` makes, each read and written."""
    dim, hidden, ups = layer.rank_in, layer.hidden, layer.products
    rows, columns, features = flash.padded_sizes(layer.tokens, dim, hidden)
    numbers = copies = 0
    if (rows, columns) != (layer.tokens, dim):
        numbers, copies = (layer.lefts + 1) * rows * columns, 2
    if (columns, features) != (dim, hidden):
        numbers, copies = numbers + (ups + 1) * columns * features, copies + ups + 1
    return elementwise_us(2 * layer.heads * numbers, copies)


def flash_us(layer: Layer, backward: bool) -> float:
    """Predicted time of the kernels of `flash_mlp`; the ranks are equal."""
    dim, tokens, hidden = layer.rank_in, layer.tokens, layer.hidden
    us = _flash_launch_us("forward", layer, tokens, hidden) + _flash_padding_us(layer)
    if backward:
        us += _flash_launch_us("backward_x", layer, tokens, hidden)
        for wanted in flash_tiles.weight_passes(dim, layer.products):
            us += _flash_launch_us("backward_w", layer, hidden, tokens, len(wanted))
    return us


def xla_us(layer: Layer, backward: bool) -> float:
    """Predicted time of XLA, which stores hidden features and what precedes them."""
    t, w, products, heads = layer.tokens, layer.hidden, layer.products, layer.heads
    us = products * xla_matmul_us(t, layer.rank_in, w, heads)
    us += elementwise_us((products + 1) * heads * t * w)
    us += xla_matmul_us(t, w, layer.rank_out, heads)
    if backward:
        us += xla_matmul_us(t, layer.rank_out, w, heads) + _gradient_matmuls_us(layer)
        us += elementwise_us((2 * products + 1) * heads * t * w)
    return us


KERNEL_US = {"flash_mlp": flash_us, "matmul": matmul_us}


def _selection_us(layer: Layer, soft: bool, backward: bool) -> float:
    """Predicted time of XLA's selection."""
    numbers = SOFT_NUMBERS if soft else TOP2_NUMBERS[backward]
    return elementwise_us(numbers * layer.tokens * layer.hidden)


def both_us(
    layer: Layer,
    kernel: Kernel,
    soft: bool = False,
    keep: bool = False,
    *,
    backward: bool,
) -> tuple[float, float]:
    """Predicted times of a kernel and of XLA.

    soft, keep: of the sparse kernels, as `sparse_us` has them.
    """
    theirs = xla_us(layer, backward)
    if kernel != "sparse":
        return KERNEL_US[kernel](layer, backward), theirs
    theirs += _selection_us(layer, soft, backward)
    return sparse_us(layer, backward, soft, keep), theirs


def beats_xla(
    layer: Layer, kernel: Kernel, soft: bool = False, keep: bool = False
) -> bool:
    """Whether a kernel is predicted to take less than XLA, by `MARGIN`, and no more
    forward."""
    ours, theirs = both_us(layer, kernel, soft, keep, backward=True)
    if ours > MARGIN[kernel] * theirs:
        return False
    ours, theirs = both_us(layer, kernel, soft, keep, backward=False)
    return ours <= theirs


def kernel_of(model: Model, name: str) -> Kernel:
    """Which kernel an unpacked row takes where there are any."""
    if name in (TOP2, SOFT):
        return "sparse"
    return dense_kernel((model.rank, model.rank))


def layer_of(model: Model, tokens: int, name: str) -> Layer:
    """Return the layer between the first and the last factor."""
    ups, r = 1 + (name == SWIGLU), model.rank
    return Layer(tokens, r, shapes.width(model, name), r, ups, ups)
