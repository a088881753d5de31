"""Rows of `benchmarks.mlp` by others: PyTorch, its sparse matmul, tokamax."""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax

import jaxkern

from . import _torch
from ._harness import PLAIN, Program
from ._torch import TOKAMAX, TORCH_SPARSE


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


def _linear_relu2(F, x, *weights):
    """ReLU² between four weights (out, in), any of which may be sparse."""
    for i, w in enumerate(weights):
        x = F.linear(x, w)
        x = F.relu(x).square() if i == 1 else x
    return x


MODULES: dict[str, Callable[..., Any]] = {
    "swiglu": _swiglu,
    "low_rank_swiglu": _low_rank_swiglu,
    "low_rank_relu2": _low_rank_relu2,
    "low_rank_relu2 2:4-static": _masked_relu2,
}


def _of_pruned(x, up, down):
    """x and the four weights (out, in); all are sparse."""
    weights = [jaxkern.unpack_2_4(factor) for factor in (*up, *down)]
    return (x, *weights), (0, 1, 2, 3)


def _of_static(x, up, down):
    """The mask is in the weight that follows, where it makes no difference."""
    weights = [*up, jaxkern.sparsify_2_4(down[0].T, method="static").T, down[1]]
    return (x, *(w.T for w in weights)), (2,)


SPARSE = {"low_rank_relu2 pruned": _of_pruned, "low_rank_relu2 2:4-static": _of_static}


def prepare_sparse(
    arrange: Callable[..., Any], to_torch: Callable[..., Any], inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """x and the weights in PyTorch, those that are 2:4 compressed, once."""
    torch = importlib.import_module("torch")
    dense, sparse = arrange(*inputs)
    x, *weights = to_torch(dense)
    for i in sparse:
        weights[i] = torch.sparse.to_sparse_semi_structured(weights[i].contiguous())
    return x, *weights


def tokamax_swiglu() -> Callable[..., Any]:
    """Its gated linear unit, and a matmul."""
    tokamax = importlib.import_module("tokamax")

    def swiglu(x, w_gate, w_up, w_down):
        weights = w_gate, w_up
        hidden = tokamax.gated_linear_unit(x, weights, activation=jax.nn.silu)
        return hidden @ w_down

    return swiglu


def torch_program(
    name: str, by: str, inputs: tuple[Any, ...], check: Any, backward: bool
) -> Program:
    if by == TORCH_SPARSE:
        prepare = partial(prepare_sparse, SPARSE[name])
        shared = "torch eager", inputs, check, backward
        program = _torch.program(_linear_relu2, *shared, prepare)
        # Its weights cannot be recorded as those of a forward that is trained.
        return replace(program, figures=dict)
    return _torch.program(MODULES[name], by, inputs, check, backward)


def computers(name: str, args: argparse.Namespace) -> list[str]:
    """The peers that have such a row, as far as they are there."""
    candidates = [
        *([PLAIN] if name != "low_rank_relu2 pruned" else []),
        *([TOKAMAX] if name == "swiglu" else []),
        *(_torch.FRAMEWORKS if name in MODULES else ()),
        *([TORCH_SPARSE] if name in SPARSE else []),
    ]
    return _torch.present(candidates, args)
