"""The published variants of `benchmarks.mlp` in PyTorch."""

from collections.abc import Callable
from typing import Any


def _swiglu(F, x, w_gate, w_up, w_down):
    return (F.silu(x @ w_gate) * (x @ w_up)) @ w_down


def _low_rank_swiglu(F, x, gate, up, down):
    hidden = F.silu((x @ gate[0]) @ gate[1]) * ((x @ up[0]) @ up[1])
    return (hidden @ down[0]) @ down[1]


def _low_rank_relu2(F, x, up, down):
    return (F.relu((x @ up[0]) @ up[1]).square() @ down[0]) @ down[1]


def _masked_relu2(F, x, up, down):
    # As published: the mask is multiplied in and the matmul is dense.
    hidden = F.relu((x @ up[0]) @ up[1]).square()
    mask = hidden.new_tensor([1, 1, 0, 0]).repeat(-(-hidden.shape[1] // 4))
    return ((hidden * mask[: hidden.shape[1]]) @ down[0]) @ down[1]


MODULES: dict[str, Callable[..., Any]] = {
    "swiglu": _swiglu,
    "low_rank_swiglu": _low_rank_swiglu,
    "low_rank_relu2": _low_rank_relu2,
    "low_rank_relu2 2:4-static": _masked_relu2,
}
