"""What the rows of `benchmarks.mlp` must compute, and how they are held to it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._harness import Check, check_against, with_gradients

# Tokens whose float64 definition is computed at a time.
CHUNK = 2048


def activate(fn, *z):
    """In float32 or wider, rounded once: what a careful user writes."""
    wide = jnp.promote_types(z[0].dtype, jnp.float32)
    return fn(*(a.astype(wide) for a in z)).astype(z[0].dtype)


def _silu_gate(gate, up):
    return jax.nn.silu(gate) * up


def swiglu(x, w_gate, w_up, w_down):
    return activate(_silu_gate, x @ w_gate, x @ w_up) @ w_down


def low_rank_swiglu(x, gate, up, down):
    z = (x @ gate[0]) @ gate[1], (x @ up[0]) @ up[1]
    return (activate(_silu_gate, *z) @ down[0]) @ down[1]


def relu2(select, x, up, down):
    hidden = activate(lambda z: jax.nn.relu(z) ** 2, (x @ up[0]) @ up[1])
    return (select(hidden) @ down[0]) @ down[1]


def keep_all(a):
    return a


def static(a):
    return a * (jnp.arange(a.shape[1]) % 4 < 2)


def groups(a):
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % 4))).reshape(len(a), -1, 4)


def top2(a):
    order = jnp.argsort(-abs(groups(a)), stable=True)
    rank = jnp.argsort(order, stable=True)
    return a * (rank < 2).reshape(len(a), -1)[:, : a.shape[1]]


def soft(a):
    def shrink(a):
        fours = groups(a)
        threshold = jnp.sort(abs(fours), axis=-1)[..., 1:2]
        s = jnp.sign(fours) * jnp.maximum(abs(fours) - threshold, 0)
        s = s.reshape(len(a), -1)[:, : a.shape[1]]
        return s * (a * s).sum(1, keepdims=True) / (s * s).sum(1, keepdims=True)

    return a + jax.lax.stop_gradient(activate(shrink, a) - a)


def unpack(packed: Any) -> Any:
    """The dense matrix of a Packed24, by what its docstring says."""
    values, indices = packed.values, packed.indices
    rows, kept = values.shape
    positions = indices[..., None] >> (2 * jnp.arange(4, dtype=jnp.uint8)) & 3
    positions = positions.reshape(rows, -1)[:, :kept] + jnp.arange(kept) // 2 * 4
    dense = jnp.zeros((rows, 2 * kept), values.dtype)
    return dense.at[jnp.arange(rows)[:, None], positions].set(values)[
        :, : packed.features
    ]


def pruned(x, up, down):
    """Of factors that are packed transposed."""
    up, down = ([unpack(factor).T for factor in pair] for pair in (up, down))
    return relu2(keep_all, x, up, down)


def _widen(a):
    is_float = jnp.issubdtype(a.dtype, jnp.floating)
    return a.astype(jnp.float64) if is_float else a


def _in_float64(
    fn: Callable[..., Any], rows: tuple[Any, ...], weights: Any
) -> list[Any]:
    """`fn` on some tokens after the others, since float64 takes room."""
    with jax.enable_x64(True):
        weights = jax.tree.map(_widen, weights)
        jitted, parts = jax.jit(fn), []
        for i in range(0, len(rows[0]), CHUNK):
            chunk = (r[i : i + CHUNK].astype(jnp.float64) for r in rows)
            parts.append(jax.tree.map(np.asarray, jitted(*chunk, *weights)))
    return parts


def check_forward(
    plain: Callable[..., Any], args: Any, fn: Callable[..., Any]
) -> Check:
    """Every token of the result."""
    x, *weights = args
    exact = np.concatenate(_in_float64(plain, (x,), weights))
    return check_against(fn(*args), jax.jit(plain)(*args), exact, x.dtype)


def check_backward(
    plain: Callable[..., Any], args: Any, fn: Callable[..., Any]
) -> Check:
    """Every token of the result and of its gradient, and all weight gradients."""
    cotangent, x, *weights = args
    both = with_gradients(plain)
    parts = _in_float64(both, (cotangent, x), weights)
    value = np.concatenate([value for value, _ in parts])
    d_x = np.concatenate([d_x for _, (d_x, *_) in parts])
    d_weights = jax.tree.map(lambda *d: sum(d), *[d[1:] for _, d in parts])
    exact = value, (d_x, *d_weights)
    return check_against(fn(*args), jax.jit(both)(*args), exact, x.dtype)
