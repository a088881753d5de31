"""Inputs, bounds on errors and float64 definitions that several tests share."""

import os
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

import jaxkern
from jaxkern import low_rank_relu2, low_rank_swiglu, swiglu
from jaxkern._core.activations import ACTIVATIONS
from jaxkern.testing import assert_as_close as assert_as_close
from jaxkern.testing import plain as definitions
from jaxkern.testing import relative_error as relative_error

# The library without static types, for tests that pass arguments of a wrong type.
untyped: Any = jaxkern
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def normal(seed, shape, dtype=jnp.float32, scale=1.0):
    # NumPy draws and rounds: JAX would compile a program for each new shape.
    drawn = scale * np.random.default_rng(seed).standard_normal(shape)
    wide = jnp.result_type(float)
    return jnp.asarray(drawn.astype(wide).astype(dtype))


def randomize(module) -> Any:
    """Add noise, so that biases are not 0 and scales of norms are not 1."""
    leaves, tree = jax.tree.flatten(nnx.state(module, nnx.Param))
    noise = [x + 0.1 * normal(i, x.shape) for i, x in enumerate(leaves)]
    nnx.update(module, jax.tree.unflatten(tree, noise))
    return module


def to_float64(tree) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def assert_near(got, expected, bound=1e-5):
    """Assert that two trees are equal up to the order of sums in float32."""
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) <= bound


def mesh(kind="auto", **axes: int):
    """Return a mesh of CPU devices: `mesh(data=2)` or `mesh("explicit", data=2)`."""
    axis_type = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[kind]
    names, sizes = tuple(axes), tuple(axes.values())
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(axes))


def with_vjp(fn, **options):
    """Return `value_and_vjp` of `fn` as one jitted function, `run(args, cotangent)`.

    It gives `fn(*args)` and the gradients of all `args`. Arguments, value and cotangent
    are any trees of arrays. `options` are passed to `fn` and not differentiated.
    """

    run = definitions.with_gradients(partial(fn, **options))
    return jax.jit(lambda args, cotangent: run(cotangent, *args))


def value_and_vjp(fn, args, cotangent):
    """Return `fn(*args)` and the gradients of all arguments, from one program."""
    return with_vjp(fn)(args, cotangent)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def swiglu_float64(x, w_gate, w_up, w_down, g) -> Any:
    """SwiGLU and its gradients by hand, in NumPy."""
    gate, up = x @ w_gate, x @ w_up
    silu = gate * sigmoid(gate)
    hidden = silu * up
    d_hidden = g @ w_down.T
    d_up = d_hidden * silu
    d_gate = d_hidden * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
    d_x = d_gate @ w_gate.T + d_up @ w_up.T
    return hidden @ w_down, (d_x, x.T @ d_gate, x.T @ d_up, hidden.T @ g)


def pair_gradient(pair, d_weight):
    """Return the gradients of two factors from the gradient of their product."""
    return d_weight @ pair[1].T, pair[0].T @ d_weight


def top2_float64(a):
    """Return the mask of the two largest magnitudes of each four, by a stable sort."""
    width = a.shape[-1]
    groups = np.pad(a, ((0, 0), (0, -width % 4))).reshape(len(a), -1, 4)
    order = np.argsort(-np.abs(groups), axis=-1, kind="stable")
    mask = np.zeros(groups.shape)
    np.put_along_axis(mask, order[..., :2], 1, axis=-1)
    return mask.reshape(len(a), -1)[:, :width]


def soft_float64(a):
    """S-STE: shrink each four by the second smallest magnitude, and rescale the row."""
    width = a.shape[-1]
    groups = np.pad(a, ((0, 0), (0, -width % 4))).reshape(len(a), -1, 4)
    threshold = np.sort(np.abs(groups), axis=-1)[..., 1:2]
    shrunk = np.sign(groups) * np.maximum(np.abs(groups) - threshold, 0)
    shrunk = shrunk.reshape(len(a), -1)[:, :width]
    energy = (shrunk * shrunk).sum(-1, keepdims=True)
    overlap = (a * shrunk).sum(-1, keepdims=True)
    return np.where(energy > 0, overlap / np.where(energy > 0, energy, 1), 1) * shrunk


def low_rank_relu2_float64(x, up, down, g, sparsity, straight_through=False) -> Any:
    """Return values and gradients; the derivative of "2:4-soft" is the identity."""
    w_up, w_down = up[0] @ up[1], down[0] @ down[1]
    z = x @ w_up
    hidden = np.maximum(z, 0) ** 2
    ones = np.ones_like(z)
    match sparsity:
        case None:
            kept, mask = hidden, ones
        case "2:4":
            mask = top2_float64(hidden)
            kept = hidden * mask
            mask = ones if straight_through else mask
        case "2:4-soft":
            kept, mask = soft_float64(hidden), ones
        case _:
            assert sparsity == "2:4-static"
            mask = ones * (np.arange(z.shape[-1]) % 4 < 2)
            kept = hidden * mask
    d_z = (g @ w_down.T) * mask * 2 * np.maximum(z, 0)
    d_up, d_down = pair_gradient(up, x.T @ d_z), pair_gradient(down, kept.T @ g)
    return kept @ w_down, (d_z @ w_up.T, d_up, d_down)


# The plain form of each selection, written with sorts.
SELECTIONS = {
    None: definitions.keep_all,
    "2:4": definitions.top2,
    "2:4-soft": definitions.soft,
    "2:4-static": definitions.static,
}


def swiglu_args(size, dtype):
    tokens, d_in, hidden, _, d_out = size
    shapes = [(d_in, hidden), (d_in, hidden), (hidden, d_out)]
    kernels = [normal(i, s, dtype, s[0] ** -0.5) for i, s in enumerate(shapes)]
    return (normal(3, (tokens, d_in), dtype), *kernels), normal(
        4, (tokens, d_out), dtype
    )


def pair(seed, d_in, rank, d_out, dtype):
    w_in = normal(seed, (d_in, rank), dtype, d_in**-0.5)
    return w_in, normal(seed + 1, (rank, d_out), dtype, rank**-0.5)


def low_rank_args(size, dtype):
    tokens, d_in, hidden, rank, d_out = size
    widen = [pair(seed, d_in, rank, hidden, dtype) for seed in (10, 20)]
    x = normal(0, (tokens, d_in), dtype)
    g = normal(1, (tokens, d_out), dtype)
    return x, *widen, pair(30, hidden, rank, d_out, dtype), g


SPARSITIES: tuple[Any, ...] = tuple(SELECTIONS)
OPS = {
    "swiglu": lambda x, a: swiglu(x, *a["kernels"]),
    "low_rank_swiglu": lambda x, a: low_rank_swiglu(x, a["gate"], a["up"], a["down"]),
    **{
        f"low_rank_relu2 {s}": lambda x, a, s=s: low_rank_relu2(
            x, a["up"], a["down"], sparsity=s
        )
        for s in SPARSITIES
    },
}


def op_args(tokens=16, d_in=24, hidden=64, rank=8):
    size = (tokens, d_in, hidden, rank, d_in)
    (_, *kernels), _ = swiglu_args(size, jnp.float32)
    x, gate, up, down, _ = low_rank_args(size, jnp.float32)
    return x, {"kernels": tuple(kernels), "gate": gate, "up": up, "down": down}


def flash_mlp_args(size, dtype, gated=False) -> tuple[Any, Any]:
    """Return (x, w1, w2), with w_gate if gated, and the result's cotangent."""
    heads, batch, dim, hidden = size
    shapes = [(heads, batch, dim), (heads, dim, hidden), (heads, hidden, dim)]
    scales = [1.0, dim**-0.5, max(hidden, 1) ** -0.5]
    if gated:
        shapes, scales = [*shapes, shapes[1]], [*scales, scales[1]]
    args = [
        normal(i, s, dtype, c)
        for i, (s, c) in enumerate(zip(shapes, scales, strict=True))
    ]
    return tuple(args), normal(7, shapes[0], dtype)


def flash_mlp_float64(args, g, activation) -> Any:
    """Return values and gradients by hand, in NumPy; only act and act' are ours."""
    x, w1, w2, *gate, g = to_float64((*args, g))
    z, up = np.matmul(x, (gate or [w1])[0]), np.matmul(x, w1) if gate else 1.0
    with jax.enable_x64(True):
        act, slope = (np.asarray(f(jnp.asarray(z))) for f in ACTIVATIONS[activation])
    hidden, d_hidden = act * up, np.matmul(g, w2.swapaxes(1, 2))
    d_z = d_hidden * up * slope
    d_x = np.matmul(d_z, (gate or [w1])[0].swapaxes(1, 2))
    d_w2, d_w = (np.matmul(a.swapaxes(1, 2), b) for a, b in ((hidden, g), (x, d_z)))
    y = np.matmul(hidden, w2)
    if not gate:
        return y, (d_x, d_w, d_w2)
    d_x = d_x + np.matmul(d_hidden * act, w1.swapaxes(1, 2))
    d_w1 = np.matmul(x.swapaxes(1, 2), d_hidden * act)
    return y, (d_x, d_w1, d_w2, d_w)


def flash_mlp_plain(activation):
    """Return the plain form: the activation in float32, every result rounded once."""
    return partial(definitions.flash_mlp, activation=activation)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_together(commands, **settings):
    """Run commands at the same time and return their output; if one hangs, end all."""
    root = str(Path(__file__).parents[1])
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": root} | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
