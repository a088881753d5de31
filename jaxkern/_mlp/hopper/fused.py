"""MLPs between low-rank cores on Hopper, of ranks too large for `flash_mlp`.

The hidden features do go to memory, in 16 bits, but what precedes the activation, for
the derivative of ReLU², does not, and nothing is read or written by an elementwise
kernel: the activation is the epilogue of the matmul before it, its derivative that of
the matmul before that one. Of an MLP (tokens, rank) -> hidden -> (tokens, rank):

- ReLU²: the forward keeps a = max(z, 0)^2, and the backward's 2 max(z, 0) is
  2 sqrt(a): two matmuls forward and four backward, as XLA has, and in either pass two
  numbers of traffic less for each hidden feature, and one less that is kept;
- gated: the forward keeps both products and the hidden features, as XLA does, and the
  backward makes both gradients in one epilogue.

The other matmuls are XLA's: on an H200 ours, without an epilogue, take up to a tenth
more.

Gated `flash_mlp` at rank 256, of 130M and 350M, is not worth having: its weight tiles
would leave room for 32 columns, whose wgmmas read 3 KB of shared memory in 16 clocks,
1.5 times what it gives; and of its backward's 15 matmuls 6 are done twice or more,
against 9 here in all.

Weights of odd sizes are padded by copies: TMA reads no row whose bytes are not a
multiple of 16 (a hidden size that is none of 8), and JAX cuts whole arrays into tiles
of 8 x 64. Of 1B, (512, 8191) and back, that is 34 MB a call, 9 us; hidden features are
made whole by the kernels themselves, and are never copied.

Arithmetic for 7B, rank 1024 and hidden 16512, at 16384 tokens on an H200: a matmul has
554 GFLOP, 0.56 ms of the tensor cores; hidden features are 541 MB, 0.11 ms of the
memory, written while the tensor cores run. XLA's activation reads and writes them once
more: 0.28 ms at 80 % of the memory's rate.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..._core import device
from ..._mosaic.base import IN_KERNEL
from ..._mosaic.matmul import (
    GATE_CLOCKS,
    GATED_COLUMNS,
    Epilogue,
    Factor,
    Products,
    Work,
    choose_columns,
    multiply,
    pad_rows,
    padded,
)


def unsupported(
    x: Any,
    ranks: Sequence[int] = (),
    sparsity: str | None = None,
    gradient: str | None = None,
) -> str | None:
    """Why no kernel takes these arguments, or None.

    ranks: of the factors that make the hidden features, and then of the last one.
    """
    if len(ranks) == 3 and ranks[0] != ranks[1]:
        return (
            "ranks of gate and up must be equal for mosaic_gpu, "
            f"got {ranks[0]} and {ranks[1]}"
        )
    if gradient == "feature_wise":
        return (
            "gradient must be None, 'exact' or 'straight_through' for mosaic_gpu, "
            "got 'feature_wise'"
        )
    if sparsity == "2:4-soft" and gradient == "exact":
        return (
            "gradient must be None or 'straight_through' for mosaic_gpu and "
            "sparsity='2:4-soft', got 'exact'"
        )
    return device.unsupported_array("x", x)


def gate_work(tokens: int, rank: int, hidden: int, lefts: int, outs: int) -> Work:
    """The forward's launch with a gate, of `outs` results."""
    return Work(tokens, rank, hidden, 2, lefts, float(outs), GATE_CLOCKS)


def relu2_mlp(core: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """max(core up, 0)^2 down, of (tokens, rank), (rank, hidden), (hidden, rank)."""
    return _relu2(*padded(core, up, down))[: core.shape[0], : down.shape[1]]


def gated_mlp(
    core: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """(silu(core gate) * core up) down.

    core: (tokens, rank), or that of gate and that of up side by side.
    """
    tokens, rank = core.shape[0], down.shape[1]
    parts = jnp.split(core, core.shape[1] // gate.shape[0], axis=1)
    parts = [pad_rows(part) for part in parts]
    args = padded(jnp.concatenate(parts, axis=1), gate, up, down)
    return _gated(*args)[:tokens, :rank]


def _relu2_epilogue(sums, aux):
    return [IN_KERNEL["relu2"].value(sums[0])]


def _relu2_derivative_epilogue(sums, aux):
    # The square root of the hidden features is what was squared.
    return [sums[0] * (2 * jnp.sqrt(aux[0]))]


def _gate_epilogue(sums, aux):
    return [IN_KERNEL["silu"].value(sums[0]) * sums[1]]


def _gate_and_keep_epilogue(sums, aux):
    return [*_gate_epilogue(sums, aux), *sums]


def _gate_derivative_epilogue(sums, aux):
    value, derivative = IN_KERNEL["silu"]
    gate, up = aux
    return [sums[0] * up * derivative(gate), sums[0] * value(gate)]


def relu2_forward(columns: int | None = None):
    """The kernel of max(core up, 0)^2."""

    @jax.custom_batching.sequential_vmap
    def kernel(core, up):
        work = Work(core.shape[0], core.shape[1], up.shape[1])
        chosen = columns or choose_columns(work)
        products = Products([Factor(core)], [Factor(up)])
        return multiply("relu2_forward", products, Epilogue(_relu2_epilogue), chosen)[0]

    return kernel


def relu2_backward(columns: int | None = None):
    """The kernel of (dy down^T) * 2 sqrt(hidden)."""

    @jax.custom_batching.sequential_vmap
    def kernel(dy, down, hidden):
        work = Work(dy.shape[0], dy.shape[1], down.shape[0], moved=2.0)
        chosen = columns or choose_columns(work)
        products = Products([Factor(dy)], [Factor(down, transposed=True)])
        epilogue = Epilogue(_relu2_derivative_epilogue, aux=[hidden])
        return multiply("relu2_backward", products, epilogue, chosen)[0]

    return kernel


def gated_forward(keep: bool, columns: int | None = None):
    """The kernel of silu(gate) * up, and, to be kept, of the two themselves."""

    @jax.custom_batching.sequential_vmap
    def kernel(core, gate, up):
        rank, hidden = gate.shape
        outs = 3 if keep else 1
        # One part of the core for each matrix, or all of it for both.
        firsts = range(0, core.shape[1], rank)
        parts = [Factor(core, first=first, width=rank) for first in firsts]
        work = gate_work(core.shape[0], rank, hidden, len(parts), outs)
        chosen = columns or choose_columns(work, GATED_COLUMNS)
        products = Products(parts, [Factor(gate), Factor(up)])
        compute = _gate_and_keep_epilogue if keep else _gate_epilogue
        epilogue = Epilogue(compute, outs)
        return tuple(multiply("gated_forward", products, epilogue, chosen))

    return kernel


def gated_backward(columns: int | None = None):
    """The kernel of both products' gradients, of dy, down and the products."""

    @jax.custom_batching.sequential_vmap
    def kernel(dy, down, gate, up):
        work = Work(dy.shape[0], dy.shape[1], down.shape[0], moved=4.0)
        chosen = columns or choose_columns(work, GATED_COLUMNS)
        products = Products([Factor(dy)], [Factor(down, transposed=True)])
        epilogue = Epilogue(_gate_derivative_epilogue, outs=2, aux=[gate, up])
        return tuple(multiply("gated_backward", products, epilogue, chosen))

    return kernel


@jax.custom_vjp
def _relu2(core, up, down):
    return jnp.matmul(relu2_forward()(core, up), down)


def _relu2_fwd(core, up, down):
    hidden = relu2_forward()(core, up)
    return jnp.matmul(hidden, down), (core, up, down, hidden)


def _relu2_bwd(saved, dy):
    core, up, down, hidden = saved
    return relu2_gradients(core, up, down, hidden, hidden, dy)


def relu2_gradients(core, up, down, hidden, kept, dy):
    """The gradients of core, up and down.

    hidden: whose square root gives the derivative.
    kept: what was multiplied by `down`, the same or some of it.
    """
    d_z = relu2_backward()(dy, down, hidden)
    return jnp.matmul(d_z, up.T), jnp.matmul(core.T, d_z), jnp.matmul(kept.T, dy)


_relu2.defvjp(_relu2_fwd, _relu2_bwd)


@jax.custom_vjp
def _gated(core, gate, up, down):
    (hidden,) = gated_forward(keep=False)(core, gate, up)
    return jnp.matmul(hidden, down)


def _gated_fwd(core, gate, up, down):
    kept = gated_forward(keep=True)(core, gate, up)
    return jnp.matmul(kept[0], down), (core, gate, up, down, kept)


def _gated_bwd(saved, dy):
    core, gate, up, down, (hidden, *products) = saved
    d_gates, d_ups = gated_backward()(dy, down, *products)
    d_cores = jnp.matmul(d_gates, gate.T), jnp.matmul(d_ups, up.T)
    d_down = jnp.matmul(hidden.T, dy)
    if core.shape[1] == gate.shape[0]:
        d_core = d_cores[0] + d_cores[1]
        return d_core, jnp.matmul(core.T, d_gates), jnp.matmul(core.T, d_ups), d_down
    of_gate, of_up = jnp.split(core, 2, axis=1)
    d_core = jnp.concatenate(d_cores, axis=1)
    return d_core, jnp.matmul(of_gate.T, d_gates), jnp.matmul(of_up.T, d_ups), d_down


_gated.defvjp(_gated_fwd, _gated_bwd)
