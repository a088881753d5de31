"""Inputs of `benchmarks.mlp`, the program of each row, and its check in float64."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

import jaxkern
from jaxkern.testing import plain

from . import _mlp_model as shapes
from . import _mlp_peers as peers
from ._harness import KERNEL, PLAIN, XLA, Check, Program, Row, check_against
from ._mlp_model import SELECTION, Model
from ._mlp_peers import TOKAMAX

WEIGHT_SCALE = 0.02
# Tokens whose float64 definition is computed at a time.
CHUNK = 2048


@dataclass(frozen=True)
class Implementation:
    """Ours, the definition it is checked against, and the published row it answers.

    ours: takes `implementation`, but for a selection alone.
    """

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    weights: str
    published: str | None = None


def _relu2(sparsity, select, published=None):
    ours = partial(jaxkern.low_rank_relu2, sparsity=sparsity)
    bare = partial(plain.relu2, select=select)
    return Implementation(ours, bare, "relu2", published)


def _select(method, plain):
    ours = partial(jaxkern.sparsify_2_4, method=method)
    return Implementation(ours, plain, "activations")


IMPLEMENTATIONS = {
    "swiglu": Implementation(jaxkern.swiglu, plain.swiglu, "full", "swiglu"),
    shapes.SWIGLU: Implementation(
        jaxkern.low_rank_swiglu, plain.low_rank_swiglu, "swiglu", "low_rank_swiglu"
    ),
    shapes.RELU2: _relu2(None, plain.keep_all, "low_rank_relu2"),
    shapes.STATIC: _relu2("2:4-static", plain.static, "low_rank_relu2_2to4"),
    shapes.TOP2: _relu2("2:4", plain.top2),
    shapes.SOFT: _relu2("2:4-soft", plain.soft),
    shapes.PRUNED: Implementation(jaxkern.low_rank_relu2, plain.pruned, "pruned"),
    f"{SELECTION} static": _select("static", plain.static),
    f"{SELECTION} top2": _select("top2", plain.top2),
    f"{SELECTION} soft": _select("soft", plain.soft),
}


def weight_shapes(model: Model, kind: str) -> Any:
    """A tree of shapes, in the order of the implementation's arguments after x."""
    h, m, r, w = model.hidden, model.intermediate, model.rank, model.relu2
    match kind:
        case "full":
            return ((h, m), (h, m), (m, h))
        case "swiglu":
            return (((h, r), (r, m)), ((h, r), (r, m)), ((m, r), (r, h)))
        case "relu2" | "pruned":
            return (((h, r), (r, w)), ((w, r), (r, h)))
        case _:
            return ()


def is_shape(tree: Any) -> bool:
    return isinstance(tree, tuple) and bool(tree) and isinstance(tree[0], int)


def make_inputs(model: Model, tokens: int, kind: str, dtype: Any, seed: int) -> Any:
    """x ~ N(0, 1), weights ~ 0.02 N(0, 1); for a selection alone, only x.

    Pruned weights are the two largest of each four that are summed, packed.
    """
    width = model.relu2 if kind == "activations" else model.hidden
    x_key, *_ = keys = jax.random.split(jax.random.key(seed), 16)
    x = jax.random.normal(x_key, (tokens, width), dtype)
    sizes, tree = jax.tree.flatten(weight_shapes(model, kind), is_leaf=is_shape)
    weights = [
        WEIGHT_SCALE * jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys[1 : len(sizes) + 1], sizes, strict=True)
    ]
    if kind == "pruned":
        weights = [jaxkern.pack_2_4(w.T) for w in weights]
    return x, *jax.tree.unflatten(tree, weights)


def check(
    form: Callable[..., Any], inputs: Any, backward: bool, run: Callable[..., Any]
) -> Check:
    """Every token of the result and, backward, all gradients against `form`."""
    count = 2 if backward else 1
    rows, weights = inputs[:count], inputs[count:]
    form = plain.with_gradients(form) if backward else form
    # Some tokens after the others, since float64 takes room.
    chunks = ([r[i : i + CHUNK] for r in rows] for i in range(0, len(rows[0]), CHUNK))
    exact = [plain.in_float64(form, *chunk, *weights) for chunk in chunks]
    if backward:
        values, gradients = zip(*exact, strict=True)
        d_x = np.concatenate([d_x for d_x, *_ in gradients])
        d_weights = jax.tree.map(lambda *d: sum(d), *(d[1:] for d in gradients))
        exact = np.concatenate(values), (d_x, *d_weights)
    else:
        exact = np.concatenate(exact)
    return check_against(run(*inputs), jax.jit(form)(*inputs), exact, rows[0].dtype)


def build(
    name: str, model: Model, tokens: int, args: argparse.Namespace, by: str
) -> Program:
    impl = IMPLEMENTATIONS[name]
    inputs = make_inputs(model, tokens, impl.weights, args.dtype, args.seed)
    fn: Any = impl.ours
    ours = by in (KERNEL, XLA) and impl.weights != "activations"
    if ours:
        chosen = "mosaic_gpu" if by == KERNEL else "xla"
        fn = partial(impl.ours, implementation=chosen)
    elif by == PLAIN:
        fn = impl.plain
    elif by == TOKAMAX:
        fn = peers.tokamax_swiglu()
    if args.backward:
        key = jax.random.key(args.seed + 1)
        shape = jax.eval_shape(impl.plain, *inputs).shape
        inputs = (jax.random.normal(key, shape, args.dtype), *inputs)
        fn = plain.with_gradients(fn)
    checked = partial(check, impl.plain, inputs, args.backward)
    if by.startswith("torch"):
        return peers.torch_program(name, by, inputs, checked, args.backward)

    def figures() -> Row:
        return {"floors_us": shapes.floors_us(model, tokens, name, args.backward)}

    return Program(fn, inputs, checked, figures=figures, ours=ours)


def computers(name: str, args: argparse.Namespace) -> list[str]:
    """By whom a row is computed: ours by XLA and by kernels, and others' libraries."""
    weights = IMPLEMENTATIONS[name].weights
    if args.backward and weights in ("activations", "pruned"):
        return []
    if weights == "activations":
        return [XLA]
    kernel = [KERNEL] if name in shapes.KERNEL_ROWS else []
    return [XLA, *kernel, *peers.computers(name, args)]
