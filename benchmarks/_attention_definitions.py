"""Plain forms of `benchmarks.attention`, and the check of its rows."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkern
from jaxkern.testing import plain

from ._attention_model import Shape, Task
from ._harness import Check, check_against, in_both

# Queries that are checked: all of a short sequence, else so many of each row's; fewer
# where all heads together have more logits, which float64 holds at once.
ALL_ROWS, SOME_ROWS = 512, 256
MOST_LOGITS = 2**28

# Allowed beside twice the plain form's error, of a gradient's usual norm: a query that
# sees one key in each of several patterns sums terms that are 0 only together.
CANCELLATION = 32 * float(jnp.finfo(jnp.float32).eps)
# Share of the largest gradient's norm that float64 leaves of one that is 0.
ZERO = 1e-12

Call = Callable[..., Any]


def attend(query, key, value, is_causal=False):
    bias = plain.causal_bias(query.shape[1]) if is_causal else None
    return _weigh_out(query, key, value, bias)


def make_module(
    shape: Shape, module: str, core: Call, dtype: Any, seed: int
) -> jaxkern.nn.MultiHeadAttention:
    """Multi-head attention around a function."""
    norms = module == "norms"
    return jaxkern.nn.MultiHeadAttention(
        shape.embed,
        shape.heads,
        attention_fn=core,
        qk_norm="embed" if norms else None,
        sub_layer_norm=norms,
        norm=partial(nnx.LayerNorm, epsilon=plain.EPSILON),
        param_dtype=dtype,
        rngs=nnx.Rngs(seed),
    )


def make_arguments(task: Task, dtype: Any, seed: int, backward: bool) -> tuple:
    """Query, key and value, each its own; then a module's parameters; first dy."""
    return _arguments(task.shape, task.module, task.scale, dtype, seed, backward)


# Rows that follow each other have the same ones.
@lru_cache(maxsize=1)
def _arguments(shape, module, scale, dtype, seed, backward):
    # NumPy's, which compiles nothing.
    random, tokens = np.random.default_rng(seed), (shape.batch, shape.seq)

    def draw(factor, heads):
        sizes = (shape.embed,) if module else (heads, shape.dim)
        numbers = random.standard_normal((*tokens, *sizes), np.float32)
        return jnp.asarray(factor * numbers, dtype)

    heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    inputs: list[Any] = list(map(draw, (scale, scale, scale, 1), heads))
    *inputs, dy = inputs
    if module:
        make = partial(make_module, shape, module, jaxkern.attention, dtype, seed)
        inputs.append(nnx.state(make()))
    return (dy, *inputs) if backward else tuple(inputs)


def rows_of(shape: Shape) -> np.ndarray:
    """The first and the last query, and others at random, in order."""
    seq = shape.seq
    if seq <= ALL_ROWS:
        return np.arange(seq, dtype=np.int32)
    some = max(2, min(SOME_ROWS, MOST_LOGITS // (shape.batch * shape.heads * seq)))
    between = np.random.default_rng(seq).choice(seq - 2, some - 2, replace=False)
    return np.sort([0, *(1 + between), seq - 1]).astype(np.int32)


def define(rows, counts, *args, backward: bool):
    """Attend from some queries: one softmax over all keys, each met so many times."""

    def result(query, key, value, *state):
        wide = np.promote_types(query.dtype, jnp.float32)
        core = partial(_weigh_out, bias=jnp.log(counts.astype(wide)))
        if state:
            return plain.multihead(core, query[:, rows], key, value, *state)
        return core(query[:, rows], key, value)

    return (plain.with_gradients(result) if backward else result)(*args)


def _weigh_out(query, key, value, bias):
    return plain.attention(query, key, value, bias)[0]


# The rows of one task follow each other.
@lru_cache(maxsize=1)
def results(task: Task, dtype: Any, seed: int, backward: bool) -> tuple[Any, Any]:
    """Results of the checked queries in the dtype, and in float64."""
    args = make_arguments(task, dtype, seed, backward)
    rows = rows_of(task.shape)
    counts = task.pattern.counts(task.shape, rows)
    if backward:
        args = (args[0][:, rows], *args[1:])
    return in_both(dtype, partial(define, backward=backward), rows, counts, *args)


def gradient_error(got: Any, exact: Any) -> float:
    """As `relative_error`, with no row's norm below the usual one's.

    A query that sees one key has gradient 0, of which rounding is all that is left. And
    a whole gradient that is 0, as a key bias's is, is held to the largest one.
    """
    got, exact = (
        [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
        for tree in (got, exact)
    )
    usual = [np.sqrt(np.mean(np.linalg.norm(x, axis=-1) ** 2)) for x in exact]

    def error(a, b, floor):
        floor = max(usual) if floor < ZERO * max(usual) else floor
        norms = np.maximum(np.linalg.norm(b, axis=-1), floor)
        return np.max(np.linalg.norm(a - b, axis=-1) / norms)

    # np.max and not max(), which may drop a NaN.
    return float(np.max(list(map(error, got, exact, usual))))


def check(key: tuple[Any, ...], run: Call) -> Check:
    """Hold the checked queries of `run` to `results(*key)`.

    The gradients are those of the checked queries alone: the others' cotangents are 0.
    """
    task, dtype, _, backward = key
    args, rows = make_arguments(*key), rows_of(task.shape)
    in_dtype, exact = results(*key)
    if not backward:
        return check_against(run(*args)[:, rows], in_dtype, exact, dtype)
    only = np.zeros((task.shape.seq, *[1] * (args[0].ndim - 2)), bool)
    only[rows] = True
    out, gradients = run(jnp.where(only, args[0], 0), *args[1:])
    of_out = check_against(out[:, rows], in_dtype[0], exact[0], dtype)
    bound = 2 * gradient_error(in_dtype[1], exact[1]) + CANCELLATION
    of_gradients = Check(gradient_error(gradients, exact[1]), bound)
    # The worse one; written so that a NaN is worse than anything.
    fine = of_gradients.error / bound <= of_out.error / of_out.bound
    return of_out if fine else of_gradients
