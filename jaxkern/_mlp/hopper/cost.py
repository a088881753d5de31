"""What an MLP takes on an H200, by each way to compute it: predicted.

Kernels by their own models. XLA's matmuls at the rates of `_mgpu_rates` that they reach
there, of the tensor cores or of the memory, whichever takes longer; each of its
elementwise programs reads and writes its arrays once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..._core import device, h200
from ..._mosaic import matmul as matmuls
from ..._mosaic.launch import ROW_STEP
from ..._mosaic.matmul import FEATURE_STEP, Work
from ..._sparsity.hopper import product as sparsity
from ..hopper import flash as flash
from . import fused, sparse

DenseKernel = Literal["flash_mlp", "matmul"]
Kernel = DenseKernel | Literal["sparse"]
# Of 16-bit numbers, what is stored of two in four: they and their positions.
PACKED = 9 / 16
# How much faster a kernel must be predicted to be. Single launches are predicted within
# a tenth; sparse ones wait in each step, which is not modelled, and fell shorter.
MARGIN = {"flash_mlp": 0.95, "matmul": 0.95, "sparse": 0.9}
# What XLA's programs read and write to select, for each hidden feature, beside what
# they do for ReLU² alone: two of four, forward and backward, and S-STE's, forward.
TOP2_NUMBERS, SOFT_NUMBERS = (0.0, 1.7), 7.5


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
    """Of a matmul of 16-bit numbers by XLA, or of one for each head."""
    rate = (
        h200.MACS_PER_CLOCK
        * device.multiprocessors()
        * h200.CLOCKS_PER_US
        * h200.XLA_MATMUL_SHARE
    )
    moved = (
        2
        * (m * depth + depth * n + m * n)
        / (h200.MEMORY_BYTES_PER_US * h200.MEMORY_SHARE)
    )
    return h200.LAUNCH_US + heads * max(m * depth * n / rate, moved)


def elementwise_us(numbers: int | float, launches: int = 1) -> float:
    """Of launches that read and write so many 16-bit numbers."""
    moved = 2 * numbers / (h200.MEMORY_BYTES_PER_US * h200.MEMORY_SHARE)
    return moved + launches * h200.LAUNCH_US


def padding_us(tokens: int, ranks: Sequence[int], hidden: int, products: int) -> float:
    """Of the copies of weights and cores; each array is read and written."""
    numbers = copies = 0
    if hidden % FEATURE_STEP or any(rank % FEATURE_STEP for rank in ranks):
        numbers += (products * ranks[0] + ranks[1]) * hidden
        copies += products + 1
    if tokens % ROW_STEP or any(rank % FEATURE_STEP for rank in ranks):
        numbers += tokens * (products * ranks[0] + ranks[1])
        copies += 2
    return elementwise_us(2 * numbers, copies)


def launch_us(work: Work, valid: Sequence[int] = matmuls.COLUMNS) -> float:
    """Of a matmul kernel with the tiles that it would choose."""
    return matmuls.predicted_us(work, matmuls.choose_columns(work, valid))


def _columns(layer: Layer) -> Sequence[int]:
    """Of the tiles that there are."""
    return matmuls.COLUMNS if layer.products == 1 else fused.GATED_COLUMNS


def _whole(layer: Layer) -> Layer:
    """With as many hidden features as the matmul kernels make."""
    hidden = -(-layer.hidden // FEATURE_STEP) * FEATURE_STEP
    return replace(layer, hidden=hidden)


def _gradient_matmuls_us(layer: Layer) -> float:
    """Of XLA's, for the inputs and the weights, but for the hidden features'."""
    t, w, heads = layer.tokens, layer.hidden, layer.heads
    us = layer.products * xla_matmul_us(t, w, layer.rank_in, heads)
    us += layer.products * xla_matmul_us(layer.rank_in, t, w, heads)
    # Of two products, inputs' gradients are joined or added.
    us += (layer.products - 1) * elementwise_us(4 * heads * t * layer.rank_in)
    return us + xla_matmul_us(w, t, layer.rank_out, heads)


def gradients_us(layer: Layer) -> float:
    """Of the matmul kernels' backward, which leaves all but one matmul to XLA."""
    layer = _whole(layer)
    moved = 2.0 * layer.products
    work = Work(layer.tokens, layer.rank_out, layer.hidden, moved=moved)
    return launch_us(work, _columns(layer)) + _gradient_matmuls_us(layer)


def matmul_us(layer: Layer, backward: bool) -> float:
    """By the matmul kernels, forward or forward and backward."""
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
    """Of the matmul that selects and packs, and writes all of it too if it is kept."""
    clocks = sparse.SHRINK_CLOCKS if shrink else sparse.SELECT_CLOCKS
    work = Work(tokens, rank, hidden, moved=PACKED + keep, clocks=clocks)
    return launch_us(work, sparse.SELECT_COLUMNS)


def sparse_work(m: int, depth: int, n: int) -> Work:
    """The product of a packed matrix with a dense one."""
    return Work(m, depth, n, density=sparsity.SPARSE_DENSITY)


def sparse_matmul_us(m: int, depth: int, n: int) -> float:
    return launch_us(sparse_work(m, depth, n))


def sparse_us(
    layer: Layer, backward: bool, soft: bool = False, keep: bool = False
) -> float:
    """By those that select 2:4; as `matmul_us`.

    soft: by S-STE, which keeps all hidden features for the backward; others if `keep`.
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


def flash_us(layer: Layer, backward: bool) -> float:
    """By the kernels of `flash_mlp`; the ranks are equal."""
    dim, ups, inputs, heads = layer.rank_in, layer.products, layer.lefts, layer.heads

    def launch(kernel: str, held: int, walked: int, sums: int = 1) -> float:
        return flash.predicted_us(kernel, heads, held, walked, dim, ups, sums, inputs)

    us = launch("forward", layer.tokens, layer.hidden)
    us += flash.padding_us(heads, layer.tokens, dim, layer.hidden, ups, inputs)
    if backward:
        parts = len(flash.input_passes(dim, inputs))
        us += parts * launch("backward_x", layer.tokens, layer.hidden)
        for wanted in flash.weight_passes(dim, ups):
            us += launch("backward_w", layer.hidden, layer.tokens, len(wanted))
    return us


def xla_us(layer: Layer, backward: bool) -> float:
    """By XLA, which stores what precedes the activation, and the hidden features."""
    t, w, products, heads = layer.tokens, layer.hidden, layer.products, layer.heads
    us = products * xla_matmul_us(t, layer.rank_in, w, heads)
    us += elementwise_us((products + 1) * heads * t * w)
    us += xla_matmul_us(t, w, layer.rank_out, heads)
    if backward:
        us += xla_matmul_us(t, layer.rank_out, w, heads) + _gradient_matmuls_us(layer)
        us += elementwise_us((2 * products + 1) * heads * t * w)
    return us


KERNEL_US = {"flash_mlp": flash_us, "matmul": matmul_us}


def fastest(layer: Layer, kernels: Sequence[DenseKernel]) -> DenseKernel:
    """Of these, forward and backward."""
    return min(kernels, key=lambda kernel: KERNEL_US[kernel](layer, True))


def _selection_us(layer: Layer, soft: bool, backward: bool) -> float:
    """Of XLA's selection."""
    numbers = SOFT_NUMBERS if soft else TOP2_NUMBERS[backward]
    return elementwise_us(numbers * layer.tokens * layer.hidden)


def beats_xla(
    layer: Layer, kernel: Kernel, soft: bool = False, keep: bool = False
) -> bool:
    """Whether it takes so much less forward and backward, and no more forward.

    soft, keep: of the sparse kernels, as `sparse_us` has them.
    """

    def both(backward: bool) -> tuple[float, float]:
        theirs = xla_us(layer, backward)
        if kernel != "sparse":
            return KERNEL_US[kernel](layer, backward), theirs
        theirs += _selection_us(layer, soft, backward)
        return sparse_us(layer, backward, soft, keep), theirs

    ours, theirs = both(True)
    if ours > MARGIN[kernel] * theirs:
        return False
    ours, theirs = both(False)
    return ours <= theirs
