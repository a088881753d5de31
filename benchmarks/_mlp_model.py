"""Shapes of `benchmarks.mlp`, and what one H200 can do with them: predictions.

Nothing here is measured on a GPU. Floors follow from the data sheet. `kernels_us` adds
up what `_mlp_cost` says of their launches, and of XLA's. It is also assumed of XLA that
it selects 2:4 in the program of the activation, and that S-STE's sums read that once
more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxkern._mlp import thresholds
from jaxkern._mlp.thresholds import FEATURE_STEP
from jaxkern._mosaic.base import round_up
from jaxkern._mosaic.launch import ROW_STEP
from jaxkern._sparsity.hopper.matmul import SPARSE_STEP
from jaxkern._sparsity.select import GROUP, KEPT

from . import _mlp_cost as cost
from ._flash_mlp_model import MEMORY_BYTES_PER_S, TENSOR_FLOPS_PER_S
from ._mlp_cost import (
    PACKED,
    Kernel,
    Layer,
    elementwise_us,
    sparse_matmul_us,
    xla_matmul_us,
)

SEQ = 512
BATCHES = (1, 4, 8, 16, 32)
PASSES = FORWARD, BOTH = "forward", "forward+backward"
ITEM = 2


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
# What the rows of our kernels run.
SWIGLU, RELU2, STATIC, TOP2, SOFT, PRUNED = KERNEL_ROWS = (
    "low_rank_swiglu",
    "low_rank_relu2",
    "low_rank_relu2 2:4-static",
    "low_rank_relu2 2:4",
    "low_rank_relu2 2:4-soft",
    "packed_relu2",
)


def passes(name: str) -> Sequence[str]:
    """Pruned weights are for inference."""
    return (FORWARD,) if name == PRUNED else PASSES


def width(model: Model, name: str) -> int:
    """Hidden features that are computed."""
    if name in ("swiglu", SWIGLU):
        return model.intermediate
    w = model.relu2
    return w // GROUP * KEPT + min(w % GROUP, KEPT) if name == STATIC else w


def count_flops(model: Model, tokens: int, name: str) -> float:
    """Of the forward's matmuls; the static mask halves those of the activated layer."""
    h, r, w = model.hidden, model.rank, width(model, name)
    if name.endswith("alone"):
        return 0.0
    per_token = {"swiglu": 6 * h * w, SWIGLU: 6 * r * (h + w)}
    return float(tokens * per_token.get(name, 4 * r * (h + w)))


def _count_weights(model: Model, name: str) -> float:
    """Numbers of 16 bits in what is multiplied."""
    numbers = count_flops(model, 1, name) / 2
    return PACKED * numbers if name == PRUNED else numbers


def floors_us(
    model: Model, tokens: int, name: str, which: str = FORWARD
) -> dict[str, float]:
    """By matmuls, and by bytes: each argument read and each result written once.

    At twice the rate go all matmuls with pruned weights, and of 2:4 activations the one
    that follows, forward. A selection alone has bytes only.
    """
    if name.endswith("alone"):
        return {"tensor": 0.0, "bytes": _bytes_us(2 * tokens * model.relu2)}
    flops = count_flops(model, tokens, name)
    saved = 0.0
    if name == PRUNED:
        saved = flops / 2
    elif name in (TOP2, SOFT):
        saved = tokens * width(model, name) * model.rank
    numbers = 2 * tokens * model.hidden + _count_weights(model, name)
    if which == BOTH:
        flops *= 3
        # x is read once for both passes.
        numbers += 2 * tokens * model.hidden + _count_weights(model, name)
    return {
        "tensor": 1e6 * (flops - saved) / TENSOR_FLOPS_PER_S,
        "bytes": _bytes_us(numbers),
    }


def _bytes_us(numbers: float) -> float:
    return 1e6 * ITEM * numbers / MEMORY_BYTES_PER_S


def percent_of_floor(floors: dict[str, float], microseconds: float) -> float:
    return 100 * max(floors.values()) / microseconds


def kernel_of(model: Model, name: str) -> Kernel:
    """Which kernel an unpacked row takes where there are any."""
    if name in (TOP2, SOFT):
        return "sparse"
    return thresholds.dense_kernel((model.rank, model.rank))


def _between_us(model: Model, tokens: int, name: str, which: str) -> float:
    """Of our kernels: all between the first and the last factor."""
    layer, both = layer_of(model, tokens, name), which == BOTH
    match kernel_of(model, name):
        case "flash_mlp":
            return cost.flash_us(layer, both)
        case "matmul":
            return cost.matmul_us(layer, both)
    return cost.sparse_us(layer, both, soft=name == SOFT)


def products_of(name: str) -> int:
    """How many products make the hidden features of a row."""
    return 2 if name == SWIGLU else 1


def layer_of(model: Model, tokens: int, name: str) -> Layer:
    """What is between the first and the last factor."""
    ups, r = products_of(name), model.rank
    return Layer(tokens, r, width(model, name), r, ups, ups)


def _ends_us(model: Model, tokens: int, joined: int, which: str) -> float:
    """First and last factor by XLA, of so many first ones in one matmul."""
    t, h, r = tokens, model.hidden, model.rank
    us = xla_matmul_us(t, h, joined * r) + xla_matmul_us(t, r, h)
    if which == BOTH:
        us += xla_matmul_us(t, joined * r, h) + xla_matmul_us(h, t, joined * r)
        us += xla_matmul_us(t, h, r) + xla_matmul_us(r, t, h)
    # They are put together in every call, and their gradients are taken apart.
    if joined > 1:
        copies = 2 if which == BOTH else 1
        us += copies * elementwise_us(2 * joined * h * r)
    return us


def _drop_us(model: Model, name: str, which: str) -> float:
    """Of the copies of two factors without what the static mask drops."""
    if name != STATIC:
        return 0.0
    numbers = 4 * model.rank * width(model, name)
    us = elementwise_us(numbers, 2)
    if which == BOTH:
        # Their gradients come back with zeros between.
        us += elementwise_us(1.5 * numbers, 2)
    return us


def kernels_us(model: Model, tokens: int, name: str, which: str = FORWARD) -> float:
    """Of our kernels' row, with what they leave to XLA: predicted, not measured."""
    if name == PRUNED:
        return _pruned_us(model, tokens)
    us = _between_us(model, tokens, name, which) + _drop_us(model, name, which)
    return us + _ends_us(model, tokens, products_of(name), which)


def _factors(model: Model) -> list[tuple[int, int]]:
    """(features in, features out) of the four of ReLU²."""
    h, r, w = model.hidden, model.rank, model.relu2
    return [(h, r), (r, w), (w, r), (r, h)]


def _pruned_us(model: Model, tokens: int) -> float:
    """Four sparse products, transposed, of weights packed along what they sum over."""
    t, us = round_up(tokens, FEATURE_STEP), 0.0
    for i, (d_in, d_out) in enumerate(_factors(model)):
        # x is padded as the transposed factor that it is.
        depth = round_up(d_in, ROW_STEP if i else FEATURE_STEP)
        us += sparse_matmul_us(round_up(d_out, ROW_STEP), depth, t)
        # Positions are put in the kernels' order in every call, of a 16th of the bytes.
        us += elementwise_us(d_in * d_out / 8)
        if d_in % SPARSE_STEP or d_out % ROW_STEP:
            us += elementwise_us(d_in * d_out)
    return us + elementwise_us(2 * tokens * model.hidden)


def xla_us(model: Model, tokens: int, name: str, which: str = FORWARD) -> float:
    """Of XLA's row: predicted, not measured."""
    t, r, both = tokens, model.rank, which == BOTH
    us = _ends_us(model, t, 1, which) + _drop_us(model, name, which)
    if name == SWIGLU:
        us += xla_matmul_us(t, model.hidden, r)
        if both:
            us += xla_matmul_us(t, r, model.hidden) + xla_matmul_us(model.hidden, t, r)
    us += cost.xla_us(layer_of(model, tokens, name), both)
    if name == SOFT:
        us += elementwise_us(t * width(model, name))
    if name == PRUNED:
        us += sum(elementwise_us((1 + PACKED) * n * k) for n, k in _factors(model))
    return us


def prediction(label: str, batch: int, name: str, which: str) -> dict[str, Any]:
    """One row: floors, our kernels, XLA."""
    model, tokens = MODELS[label], batch * SEQ
    kernel = "packed" if name == PRUNED else kernel_of(model, name)
    floors = floors_us(model, tokens, name, which)
    ours = kernels_us(model, tokens, name, which)
    return {
        "model": label,
        "batch": batch,
        "tokens": tokens,
        "implementation": name,
        "pass": which,
        "kernel": kernel,
        "floors_us": floors,
        "predicted_us": ours,
        "predicted_percent_of_floor": percent_of_floor(floors, ours),
        "predicted_xla_us": xla_us(model, tokens, name, which),
    }


def predictions() -> list[dict[str, Any]]:
    return [
        prediction(label, batch, name, which)
        for which in PASSES
        for label in MODELS
        for batch in BATCHES
        for name in KERNEL_ROWS
        if which in passes(name)
    ]
