"""Sizes of `benchmarks.mlp`, and what one H200 cannot be faster than: predicted."""

from dataclasses import dataclass

from jaxkern._mlp.hopper import sparse
from jaxkern._sparsity.select import GROUP, KEPT

from ._h200 import floors_us as floors_of

SEQ = 512
BATCHES = (1, 4, 8, 16, 32)
ITEM = 2
# Numbers that are stored of four 16-bit ones pruned to two: they and their positions.
PACKED = sparse.PACKED_NUMBERS


@dataclass(frozen=True)
class Model:
    """Sizes of one published configuration, and how often it was timed."""

    hidden: int
    intermediate: int
    rank: int
    iterations: int

    @property
    def relu2(self) -> int:
        """The ungated MLP is half as wide again."""
        return self.intermediate * 3 // 2


MODELS = {
    "60M": Model(512, 1376, 128, 100),
    "130M": Model(768, 2048, 256, 100),
    "350M": Model(1024, 2736, 256, 100),
    "1B": Model(2048, 5461, 512, 100),
    "7B": Model(4096, 11008, 1024, 100),
    "13B": Model(5120, 13824, 1280, 100),
    "33B": Model(6656, 17920, 1664, 50),
    "65B": Model(8192, 22016, 2048, 50),
}
# Rows of our kernels: the op and its variant.
SWIGLU, RELU2, STATIC, TOP2, SOFT, PRUNED = KERNEL_ROWS = (
    "low_rank_swiglu",
    "low_rank_relu2",
    "low_rank_relu2 2:4-static",
    "low_rank_relu2 2:4",
    "low_rank_relu2 2:4-soft",
    "low_rank_relu2 pruned",
)
SELECTION = "sparsify_2_4"


def width(model: Model, name: str) -> int:
    """Hidden features that are computed."""
    if name in ("swiglu", SWIGLU):
        return model.intermediate
    w = model.relu2
    return w // GROUP * KEPT + min(w % GROUP, KEPT) if name == STATIC else w


def count_flops(model: Model, tokens: int, name: str) -> float:
    """FLOPs of the forward's matmuls; the static mask halves the activated layer's."""
    h, r, w = model.hidden, model.rank, width(model, name)
    if name.startswith(SELECTION):
        return 0.0
    per_token = {"swiglu": 6 * h * w, SWIGLU: 6 * r * (h + w)}
    return float(tokens * per_token.get(name, 4 * r * (h + w)))


def _count_weights(model: Model, name: str) -> float:
    """Numbers of 16 bits in what is multiplied."""
    numbers = count_flops(model, 1, name) / 2
    return PACKED * numbers if name == PRUNED else numbers


def floors_us(
    model: Model, tokens: int, name: str, backward: bool = False
) -> dict[str, float]:
    """By matmuls, and by bytes: each argument read and each result written once.

    At twice the rate go all matmuls with pruned weights, and of 2:4 activations the one
    that follows, forward. A selection alone has bytes only.
    """
    if name.startswith(SELECTION):
        return floors_of(0.0, ITEM * 2 * tokens * model.relu2)
    flops = count_flops(model, tokens, name)
    saved = 0.0
    if name == PRUNED:
        saved = flops / 2
    elif name in (TOP2, SOFT):
        saved = tokens * width(model, name) * model.rank
    numbers = 2 * tokens * model.hidden + _count_weights(model, name)
    if backward:
        flops *= 3
        # x is read once for both passes.
        numbers += 2 * tokens * model.hidden + _count_weights(model, name)
    return floors_of(flops - saved, ITEM * numbers)
