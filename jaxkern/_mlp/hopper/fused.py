"""MLPs between low-rank cores on Hopper, for ranks too large for `flash_mlp`.

The hidden features go to memory in 16 bits, but no elementwise kernel reads or writes
them: activations and their derivatives are epilogues of the matmuls before them. The
pipeline of such a matmul is drawn in `_mosaic.matmul`. The launches, where [k] is a
kernel of this module and [x] a matmul of XLA:

    relu2    forward   core, up --[k relu2_forward]--> a = max(z, 0)^2 --[x]--> y
             backward  dy, down --[k relu2_backward, a]--> dz = da * 2 sqrt(a)
                       dz --[x] x 2--> d_core, d_up;   a, dy --[x]--> d_down
    gated    forward   core, gate, up --[k gated_forward]--> g, u, h = silu(g) * u
                       h, down --[x]--> y
             backward  dy, down --[k gated_backward, g, u]--> dg, du
                       dg, du --[x] x 4--> d_core, d_gate, d_up;  h, dy --[x]--> d_down

ReLU² has two matmuls forward and four backward, as XLA has. Since max(z, 0) is sqrt(a),
z is neither stored nor kept: in either pass two numbers less are moved for each hidden
feature. The gated form keeps g, u and h, as XLA does.

Matmuls without an epilogue are XLA's, since ours took up to a tenth more on an H200
(`launches.json`: `matmul NN 256` 784 us, `xla matmul NN` 727; `NT` 780 and 714).

A gated `flash_mlp` at rank 256 (the published 130M and 350M) is not worth having. Its
weight tiles would leave room for 32 columns, and a wgmma of 64 x 32 x 16 reads 3 KiB of
shared memory in its 16 clocks, where 2 KiB can be read. Its backward would have 15
matmuls, since each launch computes the hidden layer again, where this one has 6.

Weights of odd sizes are padded by copies: TMA reads only rows whose bytes are a
multiple of 16, which a hidden size of 8191 does not give, and JAX cuts whole arrays
into tiles of 8 x 64. For the published 1B, (512, 8191) and back, that moves 34 MB a
call: 10 us at 70 % of the memory's rate, not measured. Hidden features are written with
padded sizes by the kernels themselves and are never copied.

Arithmetic for the published 7B, rank 1024 and hidden 16512, at 16384 tokens on an H200:
a matmul has 554 GFLOP, 0.56 ms of the tensor cores at their peak. The hidden features
are 541 MB, 0.11 ms of the memory at its peak, and are written while the tensor cores
run. An activation apart would read and write them once more, and XLA's copy of as much
took 0.32 ms (`launches.json`: `xla copy`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..._core import device
from ..._mosaic.base import IN_KERNEL
from ..._mosaic.launch import pad_rows, padded
from ..._mosaic.matmul import Epilogue, Factor, Products, multiply
from ..._mosaic.work import GATE_CLOCKS, GATED_COLUMNS, Work, choose_columns


def unsupported(
    x: Any,
    ranks: Sequence[int] = (),
    sparsity: str | None = None,
    gradient: str | None = None,
) -> str | None:
    """Return why no kernel takes these arguments, or None if one does.

    ranks: ranks of the factors that make the hidden features, then of the last factor.
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
    """Return the work of the gated forward's launch, with `outs` results."""
    return Work(tokens, rank, hidden, 2, lefts, float(outs), GATE_CLOCKS)


def relu2_mlp(core: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Return max(core up, 0)^2 down.

    core: (tokens, rank). up: (rank, hidden). down: (hidden, rank).
    """
    return _relu2(*padded(core, up, down))[: core.shape[0], : down.shape[1]]


def gated_mlp(
    core: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """Return (silu(core gate) * core up) down.

    core: (tokens, rank) for both, or (tokens, 2 rank): gate's core and then up's.
    """
    tokens, rank = core.shape[0], down.shape[1]
    parts = jnp.split(core, core.shape[1] // gate.shape[0], axis=1)
    parts = [pad_rows(part) for part in parts]
    args = padded(jnp.concatenate(parts, axis=1), gate, up, down)
    return _gated(*args)[:tokens, :rank]


def _relu2_epilogue(sums, aux):
    return [IN_KERNEL["relu2"].value(sums[0])]


def _relu2_derivative_epilogue(sums, aux):
    # The derivative is 2 max(z, 0), and the hidden features are max(z, 0)^2.
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
    """Return the kernel of max(core up, 0)^2."""

    @jax.custom_batching.sequential_vmap
    def kernel(core, up):
        work = Work(core.shape[0], core.shape[1], up.shape[1])
        chosen = columns or choose_columns(work)
        products = Products([Factor(core)], [Factor(up)])
        return multiply("relu2_forward", products, Epilogue(_relu2_epilogue), chosen)[0]

    return kernel


def relu2_backward(columns: int | None = None):
    """Return the kernel of (dy down^T) * 2 sqrt(hidden)."""

    @jax.custom_batching.sequential_vmap
    def kernel(dy, down, hidden):
        work = Work(dy.shape[0], dy.shape[1], down.shape[0], moved=2.0)
        chosen = columns or choose_columns(work)
        products = Products([Factor(dy)], [Factor(down, transposed=True)])
        epilogue = Epilogue(_relu2_derivative_epilogue, aux=[hidden])
        return multiply("relu2_backward", products, epilogue, chosen)[0]

    return kernel


def gated_forward(keep: bool, columns: int | None = None):
    """Return the kernel of h = silu(g) * u, with g = core gate and u = core up.

    keep: its results are h, g and u, for a backward; else h alone.
    """

    @jax.custom_batching.sequential_vmap
    def kernel(core, gate, up):
        rank, hidden = gate.shape
        outs = 3 if keep else 1
        # Each matrix has its part of the core, or both have all of it.
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
    """Return the kernel of the gradients of both products.

    It takes dy, down, and the two products that the forward kept.
    """

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
    """Return the gradients of core, up and down.

    hidden: the hidden features whose square root gives the derivative.
    kept: the hidden features that were multiplied by `down`: the same, or a selection.
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
