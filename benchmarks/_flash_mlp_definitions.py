"""Shapes, floors and plain forms of `benchmarks.flash_mlp`, and the check of rows."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxkern.testing import plain

from ._h200 import floors_us as floors_of
from ._harness import (
    BOTH,
    FORWARD,
    Check,
    Program,
    Row,
    check_against,
    device_time,
    in_both,
    memory,
)
from ._report import published

Call = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    num_heads: int
    batch: int
    head_dim: int
    hidden_dim: int

    def __str__(self) -> str:
        return str(tuple(vars(self).values()))


PUBLISHED = {
    Shape(*(int(line[name]) for name in list(line)[:4])): line
    for line in published("flash_mlp")
}
PUBLISHED_BY = {"published eager": "pytorch", "published fused": "triton"}
# The ends of the names of the columns of time and memory.
COLUMNS = {FORWARD: ("fwd_ms", "fwd_alloc_mb"), BOTH: ("fwd_bwd_ms", "peak_mb")}


def published_of(
    shape: Shape, which: str, by: str
) -> tuple[float | None, float | None]:
    """Milliseconds and MiB, where there are any."""
    line, framework = PUBLISHED.get(shape, {}), PUBLISHED_BY[by]
    found = (line.get(f"{framework}_{column}") for column in COLUMNS[which])
    ms, mib = (float(figure) if figure else None for figure in found)
    return ms, mib


def count_flops(shape: Shape, which: str) -> float:
    """FLOPs of two matmuls forward, and of four more backward; none computed again."""
    matmul = 2.0 * shape.num_heads * shape.batch * shape.head_dim * shape.hidden_dim
    return matmul * (2 if which == FORWARD else 6)


def floors_us(shape: Shape, which: str) -> dict[str, float]:
    """Floors of one H200: by matmuls, by bytes, by activations.

    The backward of a kernel that keeps nothing computes the hidden layer again: five
    matmuls. Bytes: every argument read and every result written once, two bytes each.
    """
    heads, batch, dim, hidden = vars(shape).values()
    matmul = 2.0 * heads * batch * dim * hidden
    tokens, weights, elements = (
        heads * n for n in (batch * dim, 2 * dim * hidden, batch * hidden)
    )
    if which == FORWARD:
        return floors_of(2 * matmul, 2 * (2 * tokens + weights), elements)
    return floors_of(7 * matmul, 2 * (5 * tokens + 3 * weights), 2 * elements)


def matmul(a, w):
    return jnp.einsum("hbi,hij->hbj", a, w)


activate = partial(plain.activate, jax.nn.silu)


def torch_module(F, x, w1, w2):
    return F.silu(x @ w1) @ w2


def _pullback(fn):
    return lambda dy, *args: jax.vjp(fn, *args)[1](dy)


_matmul_back, _activate_back = _pullback(matmul), _pullback(activate)


def op_by_op(call: Call, x, w1, w2):
    """`plain.flash_mlp`, each function run by `call`; z and a stay for gradients."""
    z = call(matmul, x, w1)
    a = call(activate, z)
    return call(matmul, a, w2)


def op_by_op_with_gradients(call: Call, dy, x, w1, w2):
    """`plain.flash_mlp` and its backward; what is not needed any more is freed."""
    z = call(matmul, x, w1)
    a = call(activate, z)
    y = call(matmul, a, w2)
    da, dw2 = call(_matmul_back, dy, a, w2)
    del a
    (dz,) = call(_activate_back, da, z)
    del da, z
    dx, dw1 = call(_matmul_back, dz, x, w1)
    return y, (dx, dw1, dw2)


def _programs() -> Call:
    """Runs every function as a program of its own, which it compiles once."""
    program = cache(lambda fn: jax.jit(lambda *args: fn(*args)))
    return lambda fn, *args: program(fn)(*args)


class _Ledger:
    """Runs every function as a program of its own, and adds up what they take.

    peak: bytes of the results that are alive and of XLA's plan for one more, at most;
        None where XLA does not tell.
    device: `device_time` of all, and nothing where kernels are not to be timed.
    """

    def __init__(self, timed: bool):
        self.peak: int | None = 0
        self.device: Row = {"device_ms": 0.0} if timed else {}
        self.results: list[weakref.ref] = []

    def __call__(self, fn: Call, *args: Any) -> Any:
        compiled = jax.jit(fn).lower(*args).compile()
        alive = sum(a.nbytes for a in (ref() for ref in self.results) if a is not None)
        planned = planned_bytes(compiled)
        if planned is None or self.peak is None:
            self.peak = None
        else:
            self.peak = max(self.peak, alive + planned)
        results = compiled(*args)
        self.results += map(weakref.ref, jax.tree.leaves(results))
        if self.device.get("device_ms") is not None:
            more = device_time(compiled, args)
            if more["device_ms"] is not None:
                more = {"device_ms": self.device["device_ms"] + more["device_ms"]}
            self.device = more
        return results


def naive(
    inputs: tuple[Any, ...], check: Callable[[Call], Check], backward: bool
) -> Program:
    """Not one program but one an operation, as in eager JAX: nothing is fused."""
    fn = op_by_op_with_gradients if backward else op_by_op

    def make():
        return partial(fn, _programs())

    def figures():
        ledger = _Ledger(jax.default_backend() == "gpu")
        jax.block_until_ready(fn(ledger, *inputs))
        return {"allocated_bytes": ledger.peak} | ledger.device

    return Program(make(), inputs, check, jit=False, fresh=make, figures=figures)


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes of results and temporaries, as XLA plans them."""
    planned = memory(compiled)
    return planned["output_bytes"] + planned["temp_bytes"] if planned else None


def recorded(fn: Call, inputs: tuple[Any, ...]) -> Row:
    """Bytes of a forward that keeps what its backward needs."""

    def forward(*args):
        value, vjp = jax.vjp(fn, *args)
        kept = jax.tree.leaves(vjp)
        return value, [a for a in kept if not any(a is given for given in args)]

    compiled = jax.jit(forward).lower(*inputs).compile()
    return {"allocated_bytes": planned_bytes(compiled)}


def arguments(
    shape: Shape, dtype: Any, seed: int, backward: bool
) -> tuple[jax.Array, ...]:
    """As published: x ~ N(0, 1/dim), w1 ~ N(0, 1/hidden), w2 ~ N(0, 1/dim).

    For a backward they follow dy ~ N(0, 1).
    """
    h, b, d, e = vars(shape).values()
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes, scales = [(h, b, d), (h, d, e), (h, e, d), (h, b, d)], [d, e, d, 1]
    *inputs, dy = (
        jax.random.normal(key, shape, dtype) * jnp.asarray(scale**-0.5, dtype)
        for key, shape, scale in zip(keys, shapes, scales, strict=True)
    )
    return (dy, *inputs) if backward else tuple(inputs)


# The rows of one shape and pass follow each other.
@lru_cache(maxsize=1)
def results(shape: Shape, dtype: Any, seed: int, backward: bool) -> tuple[Any, Any]:
    """Results of `plain.flash_mlp` in the dtype and in float64."""
    args = arguments(shape, dtype, seed, backward)
    fn = plain.with_gradients(plain.flash_mlp) if backward else plain.flash_mlp
    return in_both(dtype, fn, *args)


def check(key: tuple[Any, ...], args: tuple[Any, ...], run: Call) -> Check:
    """All that `run` computes from `args` against `results(*key)`."""
    in_dtype, exact = results(*key)
    return check_against(run(*args), in_dtype, exact, args[0].dtype)
