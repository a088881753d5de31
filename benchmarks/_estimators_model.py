"""What one H200 can do with the masked layer: predictions.

Floors follow from the data sheet; `predicted_us` adds up what the kernels' own model
says of their launches, and no elementwise work between them.
"""

from jaxkern._masked.hopper import multiply as kernels

from ._estimators_definitions import Sizes

# Of an H200: dense bfloat16 matmuls and memory, a second.
TENSOR_FLOPS, MEMORY_BYTES = 989e12, 4.8e12
# Weights and activations have 16 bits, logits 32.
ITEM, LOGIT, BIT = 2, 4.0, 1 / 8
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
        "bytes": 1e6 * moved / MEMORY_BYTES,
        "stored masked weights": 1e6 * (moved + stored) / MEMORY_BYTES,
    }


def predicted_us(
    sizes: Sizes, batch: int, which: str, estimator: str = "straight_through"
) -> float:
    """Of our kernels' launches.

    A backward reads bits for logits, and logits where the estimator has a slope at
    them. By straight-through the gradients of masks alone need neither.
    """
    total = 0.0
    train_all = which == "all gradients"
    read = LOGIT if estimator != "straight_through" else BIT * train_all
    for i, (seq, d_in, d_out) in enumerate(products(sizes)):
        total += kernels.predicted_us(batch, seq, d_in, d_out, LOGIT)
        if which == "forward":
            continue
        if train_all or i == 2:
            total += kernels.predicted_us(batch, seq, d_out, d_in, BIT)
        shape = batch, seq, d_in, d_out
        total += kernels.predicted_gradients_us(*shape, LOGIT + read, train_all)
    return total
