"""What one H200 can do with the masked layer: predictions.

Floors follow from the data sheet; `predicted_us` adds up what launches are predicted to
take, by what their steps have taken there, and no elementwise work between them.
"""

from jax.experimental import pallas as pl

from jaxkern._core import device, h200
from jaxkern._masked.hopper.gradients import STEP_TOKENS, TILE_ROWS, Wanted
from jaxkern._masked.hopper.product import choose_tiles

from ._estimators_definitions import Sizes
from ._mlp_cost import MATMUL_SHARE

# Dense bfloat16 matmuls of an H200, a second.
TENSOR_FLOPS = 989e12
# Bytes of a number of weights and activations, of a logit, and of a packed mask.
ITEM = 2
LOGIT = 4.0
BIT = 1 / 8
# "masks" is forward and backward where only masks learn, and the input is no result.
PASSES = ("forward", "all gradients", "masks")


def products(sizes: Sizes) -> list[tuple[int, int, int]]:
    """(seq, d_in, d_out) of the three."""
    seq, embed, hidden = sizes
    return [(seq, embed, hidden), (seq, embed, hidden), (seq, hidden, embed)]


def floors_us(sizes: Sizes, batch: int, which: str) -> dict[str, float]:
    """By matmuls, and by bytes: each argument read and each result written once.

    "stored masked weights" adds to the bytes that a batched product of them, as "bmm",
    writes them and reads them for each product they are in.
    """
    seq, embed, _ = sizes
    weights = sum(d_in * d_out for _, d_in, d_out in products(sizes))
    tokens = batch * seq * embed
    # Of the three: y = x W; then dx = dy W^T, without the input's; then x^T dy.
    matmuls = {"forward": 3, "all gradients": 9, "masks": 7}[which]
    flops = 2.0 * batch * seq * weights / 3 * matmuls
    moved = 2 * ITEM * tokens + (ITEM + LOGIT * batch) * weights
    reads = 1
    if which != "forward":
        moved += ITEM * tokens + LOGIT * batch * weights
        reads = 2 if which == "all gradients" else 4 / 3
    if which == "all gradients":
        moved += ITEM * (tokens + weights)
    stored = ITEM * batch * weights * (1 + reads)
    return {
        "tensor": 1e6 * flops / TENSOR_FLOPS,
        "bytes": moved / h200.MEMORY_BYTES_PER_US,
        "stored masked weights": (moved + stored) / h200.MEMORY_BYTES_PER_US,
    }


def product_us(
    samples: int, seq: int, contracted: int, features: int, mask_bytes: float
) -> float:
    """Predicted us of a launch that multiplies by masked weights.

    mask_bytes: of the mask, for each number of W.
    """
    sizes = samples, seq, contracted, features, mask_bytes
    clocks = choose_tiles(*sizes).clocks(*sizes)
    return h200.LAUNCH_US + clocks / h200.CLOCKS_PER_US


def gradients_us(
    samples: int, seq: int, d_in: int, d_out: int, mask_bytes: float, want_w: bool
) -> float:
    """Predicted us of the launch that makes d_mask and maybe dW.

    mask_bytes: of the mask and of its gradient, for each number of W.
    """
    columns = Wanted(x=False, w=want_w, mask=True, dtype=None).columns
    walks = 1 if want_w else samples
    blocks = walks * pl.cdiv(d_in, TILE_ROWS) * pl.cdiv(d_out, columns)
    tokens = pl.cdiv(seq, STEP_TOKENS) * STEP_TOKENS
    turns = pl.cdiv(blocks, device.multiprocessors()) * samples / walks
    macs = turns * TILE_ROWS * columns * tokens
    rate = h200.MACS_PER_CLOCK * h200.CLOCKS_PER_US * MATMUL_SHARE
    masks = samples * d_in * d_out * mask_bytes
    loaded = blocks * samples / walks * 2 * tokens * (TILE_ROWS + columns)
    from_l2 = (loaded + masks) / h200.L2_BYTES_PER_US
    weights = ITEM * d_in * d_out * (2 if want_w else 1)
    moved = ITEM * samples * seq * (d_in + d_out) + masks + weights
    from_memory = moved / h200.MEMORY_BYTES_PER_US / h200.MEMORY_SHARE
    return h200.LAUNCH_US + max(macs / rate, from_l2, from_memory)


def predicted_us(
    sizes: Sizes, batch: int, which: str, estimator: str = "straight_through"
) -> float:
    """Predicted us of our kernels' launches.

    A backward reads bits for logits, and logits where the estimator has a slope at
    them. By straight-through the gradients of masks alone need neither.
    """
    total = 0.0
    train_all = which == "all gradients"
    read = LOGIT
    if estimator == "straight_through":
        read = BIT if train_all else 0.0
    for i, (seq, d_in, d_out) in enumerate(products(sizes)):
        total += product_us(batch, seq, d_in, d_out, LOGIT)
        if which == "forward":
            continue
        if train_all or i == 2:
            total += product_us(batch, seq, d_out, d_in, BIT)
        shape = batch, seq, d_in, d_out
        total += gradients_us(*shape, LOGIT + read, train_all)
    return total
