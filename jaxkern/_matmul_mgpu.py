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

The other matmuls are XLA's (`PLAIN`): on an H200 ours take up to a tenth more.

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

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import _mgpu_rates as h200
from ._checks import Implementation
from ._mesh import vary_alike
from ._mgpu import IN_KERNEL, multiprocessors
from ._mgpu_matmul import (
    PIECE,
    ROWS,
    Epilogue,
    Operand,
    Products,
    config_of,
    multiply,
)
from ._mgpu_walk import COMPUTE, ROW_STEP

DTYPES = ("bfloat16", "float16")
# Who does matmuls without an epilogue.
PLAIN: Implementation = "xla"
FEATURE_STEP = PIECE
# Of the tensor cores' rate, in the loop; clocks of a tile beside it, and of silu and
# the gate for each number: what launches took on an H200.
RATE, TILE_CLOCKS, GATE_CLOCKS = 0.82, 1800.0, 0.13
# Of tiles; with two products a warpgroup has the sums of both.
COLUMNS, GATED_COLUMNS = (256, 128, 64), (128, 64)


@dataclasses.dataclass(frozen=True)
class Work:
    """Of a launch: (m, depth) by (depth, n), `products` times, and what it moves.

    lefts: how many of the left factors differ.
    moved: numbers read beside the factors and written, for each one of a result.
    clocks: of the epilogue, for each number of a result.
    density: of the multiply-adds, what a dense product would take.
    """

    m: int
    depth: int
    n: int
    products: int = 1
    lefts: int = 1
    moved: float = 1.0
    clocks: float = 0.0
    density: float = 1.0


def gate_work(tokens: int, rank: int, hidden: int, lefts: int, outs: int) -> Work:
    """Of the forward's launch with a gate."""
    return Work(tokens, rank, hidden, 2, lefts, float(outs), GATE_CLOCKS)


def limits_us(work: Work, columns: int) -> dict[str, float]:
    """What a launch with tiles of so many columns waits for on an H200.

    Tiles take turns on the multiprocessors. One takes as long as its matmuls, at the
    rate that they reach there, and then its epilogue, with what it moves beside one
    result; all together no less than the factors take to come from L2, and every array
    to and from memory. Within a tenth of what single launches took there; programs that
    keep the chip busy for long took up to a fifth more.
    """
    rows = COMPUTE * ROWS
    tiles = pl.cdiv(work.m, rows) * pl.cdiv(work.n, columns)
    macs = rows * columns * work.depth * work.products * work.density
    clocks = macs / h200.MACS / RATE + TILE_CLOCKS + rows * columns * work.clocks
    factors = rows * work.density * work.lefts + columns * work.products
    loaded = 2 * work.depth * factors
    factors = work.m * work.density * work.lefts + work.n * work.products
    numbers = work.depth * factors + work.moved * work.m * work.n
    more = 2 * max(0.0, work.moved - 1) * work.m * work.n / h200.MEMORY_BYTES
    return {
        "arithmetic": pl.cdiv(tiles, multiprocessors()) * clocks / h200.CLOCKS + more,
        "L2": tiles * loaded / h200.L2_BYTES + more,
        "memory": 2 * numbers / h200.MEMORY_BYTES / h200.MEMORY_RATE,
    }


def predicted_us(work: Work, columns: int) -> float:
    """Time of a launch, by what it waits for longest."""
    return h200.LAUNCH_US + max(limits_us(work, columns).values())


def choose_columns(work: Work, valid: Sequence[int] = COLUMNS) -> int:
    """The tiles that are predicted to be fastest; of equal ones, the largest."""
    return min(valid, key=partial(predicted_us, work))


def unsupported(shape: Sequence[int], dtype: Any, *, on_hopper: bool) -> str | None:
    """Why the kernels cannot run this, or None if they can; shape: of the core."""
    if str(dtype) not in DTYPES:
        return f"dtype must be {' or '.join(DTYPES)} for mosaic_gpu, got {dtype}"
    if 0 in shape:
        return f"no axis may be empty for mosaic_gpu, got {tuple(shape)}"
    if not on_hopper:
        return "mosaic_gpu needs an H100 or H200, and the default device is none"
    return None


def pad(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """With zeros at the end up to multiples, which add nothing to any result."""
    missing = -a.shape[0] % rows, -a.shape[1] % columns
    return jnp.pad(a, [(0, n) for n in missing]) if any(missing) else a


def padded(core: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """Of sizes that the kernels take, and all varying over the same mesh axes."""
    whole = (pad(w, FEATURE_STEP, FEATURE_STEP) for w in weights)
    return vary_alike(pad(core, ROW_STEP, FEATURE_STEP), *whole)


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
    parts = [pad(part, ROW_STEP, FEATURE_STEP) for part in parts]
    args = padded(jnp.concatenate(parts, axis=1), gate, up, down)
    return _gated(*args)[:tokens, :rank]


def _parts(core: jax.Array, rank: int, transposed: bool = False) -> list[Operand]:
    """Of a core, for one matrix each, or one for both."""
    firsts = range(0, core.shape[1], rank)
    return [Operand(core, transposed, first, rank) for first in firsts]


def run(name: str, products: Any, epilogue: Any, columns: int) -> Sequence[jax.Array]:
    """A launch with tiles of so many columns."""
    return multiply(name, products, epilogue, config_of(products, epilogue, columns))


def matmul(left: Operand, right: Operand, columns: int | None = None) -> jax.Array:
    """The product alone, in our kernel."""
    columns = columns or choose_columns(
        Work(left.shape[0], left.shape[1], right.shape[1])
    )

    @jax.custom_batching.sequential_vmap
    def kernel(a, b):
        lefts = [dataclasses.replace(left, array=a)]
        rights = [dataclasses.replace(right, array=b)]
        epilogue = Epilogue(lambda sums, aux: sums)
        return run("matmul", Products(lefts, rights), epilogue, columns)[0]

    return kernel(left.array, right.array)


def plain(left: Operand, right: Operand) -> jax.Array:
    """The product alone, by whom it is fastest."""
    if PLAIN == "mosaic_gpu":
        return matmul(left, right)

    def columns(operand: Operand) -> jax.Array:
        first, width = operand.first, operand.width or operand.array.shape[1]
        return lax.slice_in_dim(operand.array, first, first + width, axis=1)

    contracted = (0 if left.transposed else 1,), (1 if right.transposed else 0,)
    return lax.dot_general(columns(left), columns(right), (contracted, ((), ())))


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
        chosen = columns or choose_columns(
            Work(core.shape[0], core.shape[1], up.shape[1])
        )
        products = Products([Operand(core)], [Operand(up)])
        return run("relu2_forward", products, Epilogue(_relu2_epilogue), chosen)[0]

    return kernel


def relu2_backward(columns: int | None = None):
    """The kernel of (dy down^T) * 2 sqrt(hidden)."""

    @jax.custom_batching.sequential_vmap
    def kernel(dy, down, hidden):
        work = Work(dy.shape[0], dy.shape[1], down.shape[0], moved=2.0)
        chosen = columns or choose_columns(work)
        products = Products([Operand(dy)], [Operand(down, transposed=True)])
        epilogue = Epilogue(_relu2_derivative_epilogue, aux=[hidden])
        return run("relu2_backward", products, epilogue, chosen)[0]

    return kernel


def gated_forward(keep: bool, columns: int | None = None):
    """The kernel of silu(gate) * up, and, to be kept, of the two themselves."""

    @jax.custom_batching.sequential_vmap
    def kernel(core, gate, up):
        rank, hidden = gate.shape
        outs = 3 if keep else 1
        parts = _parts(core, rank)
        work = gate_work(core.shape[0], rank, hidden, len(parts), outs)
        chosen = columns or choose_columns(work, GATED_COLUMNS)
        products = Products(parts, [Operand(gate), Operand(up)])
        compute = _gate_and_keep_epilogue if keep else _gate_epilogue
        epilogue = Epilogue(compute, outs)
        return tuple(run("gated_forward", products, epilogue, chosen))

    return kernel


def gated_backward(columns: int | None = None):
    """The kernel of both products' gradients, of dy, down and the products."""

    @jax.custom_batching.sequential_vmap
    def kernel(dy, down, gate, up):
        work = Work(dy.shape[0], dy.shape[1], down.shape[0], moved=4.0)
        chosen = columns or choose_columns(work, GATED_COLUMNS)
        products = Products([Operand(dy)], [Operand(down, transposed=True)])
        epilogue = Epilogue(_gate_derivative_epilogue, outs=2, aux=[gate, up])
        return tuple(run("gated_backward", products, epilogue, chosen))

    return kernel


@jax.custom_vjp
def _relu2(core, up, down):
    return plain(Operand(relu2_forward()(core, up)), Operand(down))


def _relu2_fwd(core, up, down):
    hidden = relu2_forward()(core, up)
    return plain(Operand(hidden), Operand(down)), (core, up, down, hidden)


def _relu2_bwd(saved, dy):
    core, up, down, hidden = saved
    return relu2_gradients(core, up, down, hidden, hidden, dy)


def relu2_gradients(core, up, down, hidden, kept, dy):
    """Of core, up and down.

    hidden: whose square root gives the derivative.
    kept: what was multiplied by `down`, the same or some of it.
    """
    d_z = relu2_backward()(dy, down, hidden)
    d_core = plain(Operand(d_z), Operand(up, transposed=True))
    d_up = plain(Operand(core, transposed=True), Operand(d_z))
    return d_core, d_up, plain(Operand(kept, transposed=True), Operand(dy))


_relu2.defvjp(_relu2_fwd, _relu2_bwd)


@jax.custom_vjp
def _gated(core, gate, up, down):
    (hidden,) = gated_forward(keep=False)(core, gate, up)
    return plain(Operand(hidden), Operand(down))


def _gated_fwd(core, gate, up, down):
    kept = gated_forward(keep=True)(core, gate, up)
    return plain(Operand(kept[0]), Operand(down)), (core, gate, up, down, kept)


def _gated_bwd(saved, dy):
    core, gate, up, down, (hidden, *products) = saved
    d_products = gated_backward()(dy, down, *products)
    parts, d_core, d_ups = _parts(core, gate.shape[0], transposed=True), [], []
    for n, (w, d_product) in enumerate(zip((gate, up), d_products, strict=True)):
        d_core.append(plain(Operand(d_product), Operand(w, transposed=True)))
        d_ups.append(plain(parts[min(n, len(parts) - 1)], Operand(d_product)))
    d_down = plain(Operand(hidden, transposed=True), Operand(dy))
    if len(parts) == 1:
        return d_core[0] + d_core[1], *d_ups, d_down
    return jnp.concatenate(d_core, axis=1), *d_ups, d_down


_gated.defvjp(_gated_fwd, _gated_bwd)
