"""The stages of the low-rank ReLU² MLP, each timed and predicted apart."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxkern
from jaxkern._mlp.hopper import fused, sparse
from jaxkern._mlp.thresholds import FEATURE_STEP
from jaxkern._mosaic.base import round_up
from jaxkern._mosaic.matmul import Work, pad_rows, pad_weight
from jaxkern._sparsity.hopper.product import sparse_matmul
from jaxkern.testing import plain

from . import _mlp_definitions as definitions
from ._harness import Check, Program, Row
from ._mlp_cost import (
    PACKED,
    elementwise_us,
    launch_us,
    padding_us,
    select_us,
    sparse_matmul_us,
    xla_matmul_us,
)
from ._mlp_model import ITEM, MEMORY_BYTES_PER_S, RELU2, TENSOR_FLOPS_PER_S, TOP2, Model
from ._mlp_programs import KERNEL, OURS, make_inputs, skip_without_kernels

FIRST, UP, ACTIVATION, SELECT = "first factor", "up", "ReLU²", "selection alone"
PACK, UNPACK, DOWN, DOWN_24 = "select, compress", "unpack", "down", "down 2:4"
LAST = "last factor"
UP_ACTIVATION, UP_SELECT = "up, ReLU²", "up, ReLU², compress"
DOWN_SPARSE = "down 2:4, sparse"
XLA_STAGES = (FIRST, UP, ACTIVATION, SELECT, PACK, UNPACK, DOWN, DOWN_24, LAST)
KERNEL_STAGES = (UP_ACTIVATION, UP_SELECT, DOWN_SPARSE)
BY_FRAMEWORK = {OURS: XLA_STAGES, KERNEL: KERNEL_STAGES}
# Of what a way to the result consists; each adds up. `DOWN_24` unpacks by itself.
WAYS = {
    "dense": (FIRST, UP, ACTIVATION, DOWN, LAST),
    "2:4": (FIRST, UP, ACTIVATION, SELECT, DOWN, LAST),
    "packed": (FIRST, UP, ACTIVATION, PACK, DOWN_24, LAST),
    "kernel": (FIRST, UP_ACTIVATION, DOWN, LAST),
    "sparse": (FIRST, UP_SELECT, DOWN_SPARSE, LAST),
}
# Those of which a gain is to be taken over the fastest.
DENSE_WAYS = WAYS["dense"], WAYS["kernel"]
# The rows of the op itself, which a way's sum is to be held against.
WHOLE = {
    "dense": (OURS, RELU2),
    "2:4": (OURS, TOP2),
    "kernel": (KERNEL, RELU2),
    "sparse": (KERNEL, TOP2),
}


def predicted_us(model: Model, tokens: int) -> dict[str, float]:
    """Of each stage on one H200: predicted, not measured."""
    t, h, r, w = tokens, model.hidden, model.rank, model.relu2
    padded, pads = round_up(w, FEATURE_STEP), padding_us(t, (r, r), w, 1) / 2
    packing = elementwise_us((1 + PACKED) * t * w)
    down = xla_matmul_us(t, w, r)
    return {
        FIRST: xla_matmul_us(t, h, r),
        UP: xla_matmul_us(t, r, w),
        ACTIVATION: elementwise_us(2 * t * w),
        SELECT: elementwise_us(2 * t * w),
        PACK: packing,
        UNPACK: packing,
        DOWN: down,
        DOWN_24: packing + down,
        LAST: xla_matmul_us(t, r, h),
        UP_ACTIVATION: pads + launch_us(Work(t, r, padded)),
        UP_SELECT: pads + select_us(t, r, padded),
        DOWN_SPARSE: pads + sparse_matmul_us(t, padded, r),
    }


def count_macs(model: Model, tokens: int, stage: str) -> float:
    """Multiply-adds, of 2:4 those with zeros too."""
    if stage in (ACTIVATION, SELECT, PACK, UNPACK):
        return 0.0
    h, w = model.hidden, model.relu2
    features = h if stage in (FIRST, LAST) else w
    return float(tokens * model.rank * features)


def floors_us(model: Model, tokens: int, stage: str) -> dict[str, float]:
    """By matmuls, and by bytes: each argument read and each result written once."""
    t, h, r, w = tokens, model.hidden, model.rank, model.relu2
    # 2:4 at twice the rate.
    rate = TENSOR_FLOPS_PER_S * (2 if stage in (DOWN_24, DOWN_SPARSE) else 1)
    hidden = t * w
    numbers = {
        FIRST: t * h + h * r + t * r,
        LAST: t * h + h * r + t * r,
        ACTIVATION: 2 * hidden,
        SELECT: 2 * hidden,
        PACK: (1 + PACKED) * hidden,
        UNPACK: (1 + PACKED) * hidden,
    }.get(stage)
    if numbers is None:
        packed = stage in (DOWN_24, DOWN_SPARSE, UP_SELECT)
        numbers = t * r + r * w + (PACKED if packed else 1) * hidden
    tensor = 1e6 * 2 * count_macs(model, tokens, stage) / rate
    return {"tensor": tensor, "bytes": 1e6 * ITEM * numbers / MEMORY_BYTES_PER_S}


@dataclass(frozen=True)
class Stage:
    """What it runs, of which arrays; and its definition, of dense ones.

    plain, dense: by default `run`, `takes`.
    finish: makes the definition's result of what it returns.
    """

    run: Callable[..., Any]
    takes: Sequence[str]
    plain: Callable[..., Any] | None = None
    dense: Sequence[str] = ()
    finish: Callable[[Any], Any] = lambda y: y


def _relu2(z):
    return plain.activate(lambda z: jax.nn.relu(z) ** 2, z)


def _up_relu2(core, up):
    return _relu2(core @ up)


def _sums(a):
    """Of each four: of two that are almost equal, either may be kept."""
    return plain.groups(a).sum(-1)


def _up_top2(core, up):
    return _sums(plain.top2(_up_relu2(core, up)))


def _top2_down(hidden, down):
    return plain.top2(hidden) @ down


CORE, HIDDEN = ("core", "up"), ("hidden", "down")
BY_XLA = {
    FIRST: Stage(jnp.matmul, ("x", "first")),
    UP: Stage(jnp.matmul, CORE),
    ACTIVATION: Stage(_relu2, ["z"]),
    SELECT: Stage(jaxkern.sparsify_2_4, ["hidden"], plain.top2),
    PACK: Stage(
        jaxkern.pack_2_4,
        ["hidden"],
        plain.top2,
        finish=plain.unpack,
    ),
    UNPACK: Stage(jaxkern.unpack_2_4, ["packed"], plain.top2, ["hidden"]),
    DOWN: Stage(jnp.matmul, HIDDEN),
    DOWN_24: Stage(
        partial(jaxkern.matmul_2_4, implementation="xla"),
        ("packed", "down"),
        _top2_down,
        HIDDEN,
    ),
    LAST: Stage(jnp.matmul, ("inner", "last")),
}


def _relu2_kernel(core, up):
    """As the op pads the factors of its kernels, in every call."""
    return fused.relu2_forward()(pad_rows(core), pad_weight(up))


def _select_kernel(core, up):
    """Values, and words of positions."""
    kernel = sparse.select_forward(shrink=False, keep=False)
    return kernel(pad_rows(core), pad_weight(up))[:2]


def _sparse_kernel(values, words, down):
    return sparse_matmul()(values, words, pad_weight(down))


def _dense(chosen: Any, tokens: int, hidden: int) -> jax.Array:
    return sparse.dense(sparse.Chosen(*chosen), hidden)[:tokens]


def _by_kernels(tokens: int, rank: int, hidden: int) -> dict[str, Stage]:
    """What they return is padded, too."""

    def cut(columns: int, y: jax.Array) -> jax.Array:
        return y[:tokens, :columns]

    def sums(chosen: Any) -> jax.Array:
        return _sums(_dense(chosen, tokens, hidden))

    taken, kept = ("values", "words", "down"), ("kept", "down")
    hiddens, cores = partial(cut, hidden), partial(cut, rank)
    return {
        UP_ACTIVATION: Stage(_relu2_kernel, CORE, _up_relu2, finish=hiddens),
        UP_SELECT: Stage(_select_kernel, CORE, _up_top2, finish=sums),
        DOWN_SPARSE: Stage(_sparse_kernel, taken, jnp.matmul, kept, cores),
    }


# Stages of one model follow each other.
@lru_cache(maxsize=1)
def arrays(model: Model, tokens: int, dtype: Any, seed: int) -> dict[str, Any]:
    """All that stages take, but what the kernels select."""
    x, up, down = make_inputs(model, tokens, "relu2", dtype, seed)
    core = x @ up[0]
    z = core @ up[1]
    hidden = _relu2(z)
    return {
        "x": x,
        "first": up[0],
        "up": up[1],
        "down": down[0],
        "last": down[1],
        "core": core,
        "z": z,
        "hidden": hidden,
        "packed": jaxkern.pack_2_4(hidden),
        "inner": hidden @ down[0],
    }


def _check(stage: Stage, found: dict[str, Any], inputs: Any, run: Any) -> Check:
    dense = [found[name] for name in stage.dense or stage.takes]
    plain = stage.plain or stage.run

    def finished(*_: Any) -> Any:
        return stage.finish(run(*inputs))

    return definitions.check_forward(plain, dense, finished)


def build(name: str, model: Model, tokens: int, args: argparse.Namespace) -> Program:
    by_kernel = name in KERNEL_STAGES
    if by_kernel:
        skip_without_kernels(tokens, model.rank, args.dtype)
    found = arrays(model, tokens, args.dtype, args.seed)
    stages = BY_XLA | _by_kernels(tokens, model.rank, model.relu2)
    stage = stages[name]
    if name == DOWN_SPARSE:
        values, words = jax.jit(_select_kernel)(found["core"], found["up"])
        kept = _dense((values, words), tokens, model.relu2)
        found = found | {"values": values, "words": words, "kept": kept}
    inputs = tuple(found[name] for name in stage.takes)
    check = partial(_check, stage, found, inputs)
    return Program(
        stage.run, inputs, check, figures=partial(_figures, name, model, tokens)
    )


def _figures(name: str, model: Model, tokens: int) -> Row:
    """Of an H200 and 16 bits."""
    us = predicted_us(model, tokens)
    return {"floors_us": floors_us(model, tokens, name), "predicted_us": us[name]}
