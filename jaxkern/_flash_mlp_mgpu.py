"""The multi-head MLP on Hopper: the hidden layer stays on the chip, in both passes.

Two warpgroups compute, each its own rows, and one loads. The forward holds a tile of
tokens and walks the hidden axis; while the activation of one tile runs on the special
function units, the next tile's matmul runs on the tensor cores. The backward computes
the hidden layer again, twice: for dx over tiles of tokens, walking the hidden axis, and
for the weights over tiles of hidden features, walking the tokens. So there are seven
matmuls where five would do, and in return no atomics: gradients are deterministic.
Rows and features past the end are zeros when TMA loads them, dropped when it stores.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._mgpu import (
    IN_KERNEL,
    TMA_ROW_BYTES,
    dot,
    dot_add,
    plgpu,
    slot,
    swizzle_of,
    tiles,
    zeros,
)

COMPUTE = 2
# With 168 registers a thread at launch, 2 x 240 and 24 are what three warpgroups have.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
DTYPES = ("bfloat16", "float16")
MIN_DIM, MAX_DIM, DIM_STEP = 16, 256, 16
# Beyond, the sums for both weights do not fit in registers: a pass for each.
BOTH_WEIGHTS_DIM = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one pass.

    rows: tokens of one computing warpgroup (hidden features, for the weights' pass).
    columns: what a step of the walk takes: hidden features (tokens).
    steps: tiles in flight.
    """

    rows: int
    columns: int
    steps: int

    def __post_init__(self):
        for name, size, step in [("rows", self.rows, 64), ("columns", self.columns, 8)]:
            if size < step or size % step:
                raise ValueError(
                    f"flash_mlp: {name} must be a multiple of {step}, got {size}"
                )
        if self.columns > 256 or self.steps < 1:
            raise ValueError(
                "flash_mlp: columns must be at most 256 and steps at least 1, "
                f"got {self.columns} and {self.steps}"
            )


# The largest tiles that spill no register; predicted to be fast, not measured.
def forward_config(dim: int) -> Config:
    return Config(64, 128, 2) if dim <= 128 else Config(64, 64, 2)


def backward_x_config(dim: int) -> Config:
    if dim <= 128:
        return Config(64, 64, 2)
    return Config(64, 32, 2) if dim <= 192 else Config(64, 16, 2)


def backward_w_config(dim: int) -> Config:
    return Config(64, 64, 2) if dim <= 96 else Config(64, 32, 2)


def weight_passes(dim: int) -> tuple[tuple[str, ...], ...]:
    """The launches that make the weights' gradients, and what each makes."""
    return (("w1", "w2"),) if dim <= BOTH_WEIGHTS_DIM else (("w1",), ("w2",))


def unsupported(
    x: jax.Array, w1: jax.Array, w2: jax.Array, *, on_hopper: bool
) -> str | None:
    """Why the kernel cannot run this, or None if it can."""
    dim, hidden = w1.shape[1:]
    itemsize = x.dtype.itemsize
    if str(x.dtype) not in DTYPES:
        return f"dtype must be {' or '.join(DTYPES)} for mosaic_gpu, got {x.dtype}"
    if not MIN_DIM <= dim <= MAX_DIM or dim % DIM_STEP:
        return (
            f"dim must be a multiple of {DIM_STEP} from {MIN_DIM} to {MAX_DIM} "
            f"for mosaic_gpu, got {dim}"
        )
    if hidden * itemsize % TMA_ROW_BYTES:
        step = TMA_ROW_BYTES // itemsize
        return f"hidden must be a multiple of {step} for mosaic_gpu, got {hidden}"
    if 0 in x.shape or hidden == 0:
        return f"no axis may be empty for mosaic_gpu, got {x.shape} and {hidden}"
    if not on_hopper:
        return "mosaic_gpu needs an H100 or H200, and the default device is none"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def mlp(x, w1, w2, activation):
    """act(x w1) w2 for each head; what `unsupported` lets through."""
    return forward(activation)(x, w1, w2)


def _mlp_fwd(x, w1, w2, activation):
    return mlp(x, w1, w2, activation), (x, w1, w2)


def _mlp_bwd(activation, saved, dy):
    args = (*saved, dy)
    dx = backward_x(activation)(*args)
    passes = weight_passes(saved[0].shape[-1])
    dw1_t, dw2 = (dw for p in passes for dw in backward_w(activation, p)(*args))
    return dx, dw1_t.mT, dw2


mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _over_heads(kernel):
    """Under `vmap` the new axis joins the heads; what lacks it is repeated."""
    kernel = jax.custom_batching.custom_vmap(kernel)

    @kernel.def_vmap
    def fold(size, is_batched, *args):
        args = [
            a if batched else jnp.broadcast_to(a, (size, *a.shape))
            for a, batched in zip(args, is_batched, strict=True)
        ]
        outs = kernel(*(a.reshape(-1, *a.shape[2:]) for a in args))
        outs = jax.tree.map(lambda o: o.reshape(size, -1, *o.shape[1:]), outs)
        return outs, jax.tree.map(lambda _: True, outs)

    return kernel


def forward(activation: str):
    """The forward's kernel, of x, w1 and w2."""
    return _over_heads(partial(_forward, activation))


def backward_x(activation: str):
    """The kernel of dx, of x, w1, w2 and dy."""
    return _over_heads(partial(_backward_x, activation))


def backward_w(activation: str, wanted: tuple[str, ...]):
    """The kernel of the weights' gradients, of x, w1, w2 and dy."""
    return _over_heads(partial(_backward_w, activation, wanted))


def _load_ring(steps, count, produced, consumed, load):
    """What the loading warpgroup does: fill each slot once its last tile is consumed.

    load: from the step and its slot to (source, target) in the order of the barriers.
    """
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

    @pl.loop(0, count)
    def _(i):
        s = slot(i, steps)
        for n, (source, target) in enumerate(load(i, s)):

            @pl.when(i >= steps)
            def _(n=n):
                plgpu.barrier_wait(consumed[n].at[s])

            plgpu.copy_gmem_to_smem(source, target, produced[n].at[s])

    # A barrier must be seen to the end of its last phase.
    @pl.loop(max(0, count - steps), count)
    def _(i):
        for barrier in consumed:
            plgpu.barrier_wait(barrier.at[slot(i, steps)])


def _load_weights(config, count, gmem, smem, produced, consumed):
    """Tiles of w1 and w2 along the hidden axis."""

    def tiles_of(i, s):
        features = pl.ds(i * config.columns, config.columns)
        yield gmem[0].at[:, features], smem[0].at[s]
        yield gmem[1].at[features], smem[1].at[s]

    _load_ring(config.steps, count, produced, consumed, tiles_of)


def _store(value, smem, gmem):
    smem[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)
    plgpu.wait_smem_to_gmem(0)


def _launch(kernel, config, out, grid, smem, barriers, name):
    """`smem`: the shapes of the kernel's buffers, in order."""
    dtype = out[0].dtype
    # One swizzle for all tiles, since both operands of a wgmma need the same; it must
    # tile the contracted axis too.
    narrowest = math.gcd(config.columns, *(shape[-1] for shape in smem))
    layout = tiles(dtype, swizzle_of(narrowest, dtype.itemsize))
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=[plgpu.SMEM(s, dtype, transforms=layout) for s in smem]
        + barriers,
        grid=grid,
        grid_names=("head", "tile"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _ring_barriers(steps):
    """Of two tiles a step: produced by TMA, consumed by every computing warpgroup."""
    produced = [plgpu.Barrier(num_barriers=steps) for _ in range(2)]
    consumed = [
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=steps) for _ in range(2)
    ]
    return [*produced, *consumed]


def _forward(activation, x, w1, w2):
    heads, batch, dim = x.shape
    config = forward_config(dim)
    rows, columns, steps = config.rows, config.columns, config.steps
    count = pl.cdiv(w1.shape[2], columns)
    act = IN_KERNEL[activation].value

    def kernel(
        x_gmem, w1_gmem, w2_gmem, y_gmem, x_smem, w1_smem, w2_smem, x_produced,
        w1_produced, w2_produced, w1_consumed, w2_consumed,
    ):  # fmt: skip
        head, tile = lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            tokens = pl.ds((tile * COMPUTE + warpgroup) * rows, rows)
            x = x_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(
                x_gmem.at[head, tokens], x, x_produced.at[warpgroup]
            )
            plgpu.barrier_wait(x_produced.at[warpgroup])
            plgpu.barrier_wait(w1_produced.at[0])
            z = dot(x, w1_smem.at[0])
            plgpu.barrier_arrive(w1_consumed.at[0])

            def body(i, carry):
                y, z = carry
                here, ahead = slot(i, steps), slot(i + 1, steps)

                def overlap(z_next):
                    plgpu.barrier_wait(w1_produced.at[ahead])
                    # In flight during the activation of this tile.
                    plgpu.wgmma(z_next, x, w1_smem.at[ahead])
                    hidden = act(z).astype(x.dtype)
                    plgpu.barrier_wait(w2_produced.at[here])
                    return dot_add(y, hidden, w2_smem.at[here]), z_next[...]

                y, z = pl.run_scoped(overlap, plgpu.ACC((rows, columns), jnp.float32))
                plgpu.barrier_arrive(w1_consumed.at[ahead])
                plgpu.barrier_arrive(w2_consumed.at[here])
                return y, z

            y, z = lax.fori_loop(0, count - 1, body, (zeros(rows, dim), z))
            last = slot(jnp.int32(count - 1), steps)
            plgpu.barrier_wait(w2_produced.at[last])
            y = dot_add(y, act(z).astype(x.dtype), w2_smem.at[last])
            plgpu.barrier_arrive(w2_consumed.at[last])
            _store(y, x, y_gmem.at[head, tokens])

        @pl.when(warpgroup == COMPUTE)
        def load():
            weights = (w1_gmem.at[head], w2_gmem.at[head]), (w1_smem, w2_smem)
            consumed = w1_consumed, w2_consumed
            _load_weights(config, count, *weights, (w1_produced, w2_produced), consumed)

    return _launch(
        kernel,
        config,
        (jax.ShapeDtypeStruct(x.shape, x.dtype),),
        (heads, pl.cdiv(batch, COMPUTE * rows)),
        [(COMPUTE, rows, dim), (steps, dim, columns), (steps, columns, dim)],
        [plgpu.Barrier(num_barriers=COMPUTE), *_ring_barriers(steps)],
        "flash_mlp_forward",
    )(x, w1, w2)[0]


def _backward_x(activation, x, w1, w2, dy):
    heads, batch, dim = x.shape
    config = backward_x_config(dim)
    rows, columns, steps = config.rows, config.columns, config.steps
    count = pl.cdiv(w1.shape[2], columns)
    derivative = IN_KERNEL[activation].derivative

    def kernel(
        x_gmem, w1_gmem, w2_gmem, dy_gmem, dx_gmem, x_smem, dy_smem, w1_smem, w2_smem,
        rows_produced, w1_produced, w2_produced, w1_consumed, w2_consumed,
    ):  # fmt: skip
        head, tile = lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            tokens = pl.ds((tile * COMPUTE + warpgroup) * rows, rows)
            x, dy = x_smem.at[warpgroup], dy_smem.at[warpgroup]
            ready = rows_produced.at[warpgroup]
            plgpu.copy_gmem_to_smem(x_gmem.at[head, tokens], x, ready)
            plgpu.copy_gmem_to_smem(dy_gmem.at[head, tokens], dy, ready)
            plgpu.barrier_wait(ready)

            def body(i, dx):
                s = slot(i, steps)
                w1, w2 = w1_smem.at[s], w2_smem.at[s]
                plgpu.barrier_wait(w1_produced.at[s])
                z = dot(x, w1)
                plgpu.barrier_wait(w2_produced.at[s])
                d_hidden = dot(dy, w2.transpose((1, 0)))
                plgpu.barrier_arrive(w2_consumed.at[s])
                dz = (d_hidden * derivative(z)).astype(x.dtype)
                dx = dot_add(dx, dz, w1.transpose((1, 0)))
                plgpu.barrier_arrive(w1_consumed.at[s])
                return dx

            dx = lax.fori_loop(0, count, body, zeros(rows, dim))
            _store(dx, x, dx_gmem.at[head, tokens])

        @pl.when(warpgroup == COMPUTE)
        def load():
            weights = (w1_gmem.at[head], w2_gmem.at[head]), (w1_smem, w2_smem)
            consumed = w1_consumed, w2_consumed
            _load_weights(config, count, *weights, (w1_produced, w2_produced), consumed)

    held = (COMPUTE, rows, dim)
    return _launch(
        kernel,
        config,
        (jax.ShapeDtypeStruct(x.shape, x.dtype),),
        (heads, pl.cdiv(batch, COMPUTE * rows)),
        [held, held, (steps, dim, columns), (steps, columns, dim)],
        [
            plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            *_ring_barriers(steps),
        ],
        "flash_mlp_backward_x",
    )(x, w1, w2, dy)[0]


def _backward_w(activation, wanted, x, w1, w2, dy):
    """Of dw1, transposed, and dw2 those that are wanted: "w1", "w2" or both.

    Hidden features are the rows, so that only views of SMEM are transposed.
    """
    heads, batch, dim = x.shape
    hidden, config = w1.shape[2], backward_w_config(dim)
    rows, columns, steps = config.rows, config.columns, config.steps
    count = pl.cdiv(batch, columns)
    act, derivative = IN_KERNEL[activation]

    def kernel(x_gmem, w1_gmem, w2_gmem, dy_gmem, *refs):
        out_gmem, refs = refs[: len(wanted)], refs[len(wanted) :]
        w1_smem, w2_smem, x_smem, dy_smem, weights_produced, *refs = refs
        x_produced, dy_produced, x_consumed, dy_consumed = refs
        head, tile = lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            features = pl.ds((tile * COMPUTE + warpgroup) * rows, rows)
            w1, w2 = w1_smem.at[warpgroup], w2_smem.at[warpgroup]
            ready = weights_produced.at[warpgroup]
            plgpu.copy_gmem_to_smem(w1_gmem.at[head, :, features], w1, ready)
            plgpu.copy_gmem_to_smem(w2_gmem.at[head, features], w2, ready)
            plgpu.barrier_wait(ready)

            def body(i, sums):
                s = slot(i, steps)
                x, dy = x_smem.at[s], dy_smem.at[s]
                added = dict(zip(wanted, sums, strict=True))
                plgpu.barrier_wait(x_produced.at[s])
                z = dot(w1.transpose((1, 0)), x.transpose((1, 0)))
                plgpu.barrier_wait(dy_produced.at[s])
                if "w2" in wanted:
                    added["w2"] = dot_add(added["w2"], act(z).astype(w2.dtype), dy)
                if "w1" in wanted:
                    d_hidden = dot(w2, dy.transpose((1, 0)))
                    dz = (d_hidden * derivative(z)).astype(w1.dtype)
                    added["w1"] = dot_add(added["w1"], dz, x)
                plgpu.barrier_arrive(dy_consumed.at[s])
                plgpu.barrier_arrive(x_consumed.at[s])
                return tuple(added[name] for name in wanted)

            start = tuple(zeros(rows, dim) for _ in wanted)
            sums = lax.fori_loop(0, count, body, start)
            # The tile of w2 has been read to the end, and has the results' shape.
            for added, gmem in zip(sums, out_gmem, strict=True):
                _store(added, w2, gmem.at[head, features])

        @pl.when(warpgroup == COMPUTE)
        def load():
            def tiles_of(i, s):
                tokens = pl.ds(i * columns, columns)
                yield x_gmem.at[head, tokens], x_smem.at[s]
                yield dy_gmem.at[head, tokens], dy_smem.at[s]

            produced = x_produced, dy_produced
            _load_ring(steps, count, produced, (x_consumed, dy_consumed), tiles_of)

    walked = (steps, columns, dim)
    shape = jax.ShapeDtypeStruct((heads, hidden, dim), x.dtype)
    return _launch(
        kernel,
        config,
        tuple(shape for _ in wanted),
        (heads, pl.cdiv(hidden, COMPUTE * rows)),
        [(COMPUTE, dim, rows), (COMPUTE, rows, dim), walked, walked],
        [plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE), *_ring_barriers(steps)],
        f"flash_mlp_backward_{'_'.join(wanted)}",
    )(x, w1, w2, dy)
