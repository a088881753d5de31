"""Plain forms of `benchmarks.flash_mlp`, and the check of its rows."""

import weakref
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxkern.testing import plain

from ._flash_mlp_model import Shape
from ._harness import (
    Check,
    Program,
    Row,
    check_against,
    device_time,
    in_both,
)

Call = Callable[..., Any]


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

    def figures(self) -> Row:
        return {"allocated_bytes": self.peak} | self.device


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
        return ledger.figures()

    return Program(make(), inputs, check, jit=False, fresh=make, figures=figures)


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes of results and temporaries, as XLA plans them."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return stats.output_size_in_bytes + stats.temp_size_in_bytes


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
