"""The multi-head MLP on Hopper: the hidden layer stays on the chip, in both passes.

The forward holds tokens and walks the hidden axis: while the activation of one tile
runs on the special function units, the next tile's matmul runs on the tensor cores.

The backward computes the hidden layer again, twice: for dx it holds tokens and walks
the hidden axis, for the weights it holds hidden features and walks the tokens. That is
seven matmuls where five would do. One pass of five has both sums to make, over hidden
features for dx and over tokens for the weights, and one of them must leave the block:

- dx, for hidden tiles of 128 features: float32 partial sums, written and read again,
  are 8 bytes x tokens x dim x hidden / 128 a head. At (32, 4096, 64, 512) that is
  268 MB, 56 us at 4.8 TB/s, to save two matmuls of 17 us at the tensor cores' rate.
- both weights, a copy for every group of blocks that share a head: at hidden 512 and
  dim 64 those are 256 KB in float32, more than a block's registers or shared memory.
- atomics in float32 have the traffic of the first, and a result that depends on the
  order of arrival.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._mgpu import (
    IN_KERNEL,
    SMEM_BYTES,
    TMA_ROW_BYTES,
    add_dots,
    dots,
    multiprocessors,
    plgpu,
    vary_alike,
    zeros,
)
from ._mgpu_walk import STEP, Config, Operand, walk

DTYPES = ("bfloat16", "float16")
MAX_DIM = 256
# Of the gated form, whose tiles take half as much shared memory again.
MAX_GATED_DIM = 192

# Of an H200: multiply-adds and special function operations a clock of one
# multiprocessor; memory and L2 bytes, and clocks, a microsecond.
MACS, MUFU_OPS = 2048, 16
MEMORY_BYTES, L2_BYTES, CLOCKS = 4.8e6, 5.5e6, 1830.0
# Predicted: the part of the tensor cores' and the memory's rate that is reached, and
# microseconds of a launch until its first loads are there and its last stores done.
MATMUL_RATE, MEMORY_RATE, LAUNCH_US = 0.7, 0.8, 2.0


def configs(kernel: str, dim: int, ups: int) -> tuple[Config, ...]:
    """The tiles to choose from, the largest first.

    The largest that spill no register; predicted to be fast, not measured.
    """
    dim = pl.cdiv(dim, STEP) * STEP
    match kernel, ups:
        case "forward", 1:
            columns = 128 if dim <= 128 else 64 if dim <= 224 else 32
        case "backward_x", 1:
            columns = 128 if dim <= 64 else 64 if dim <= 128 else 32
        case "backward_w", 1:
            columns = 64 if dim <= 96 else 32
        case _:
            columns = 64 if dim <= 64 else 32
    tile_bytes = 64 * dim * 2
    held, walked = {
        "forward": (1, ups + 1),
        "backward_x": (2, ups + 1),
        "backward_w": (ups + 1, 2),
    }[kernel]
    needed = 2 * 2 * held * tile_bytes + 2 * walked * columns * tile_bytes // 64
    normal = Config(64, columns, held=2 if needed <= SMEM_BYTES - 2048 else 1)
    half = Config(64, min(columns, 64), steps=4, split=True, held=1)
    wide = (Config(128, 64),) if (kernel, ups) == ("forward", 1) and dim <= 96 else ()
    splits = dim <= (96 if kernel == "backward_w" else 128)
    return (*wide, normal, half) if splits else (*wide, normal)


def weight_passes(dim: int, ups: int) -> tuple[tuple[int, ...], ...]:
    """The launches that make the weights' gradients, and which ones each makes.

    As many as have their sums in registers: the first matrices by number, then w2.
    """
    names = range(ups + 1)
    together = 2 if dim <= (128 if ups == 1 else 96) else 1
    return tuple(tuple(names[i : i + together]) for i in range(0, len(names), together))


def choose(kernel: str, heads: int, size: int, dim: int, ups: int) -> Config:
    """The tiles of which a multiprocessor has the fewest rows to compute."""
    sms = multiprocessors()

    def rows_in_turn(config: Config) -> int:
        rows = config.rows * config.parts
        return pl.cdiv(heads * pl.cdiv(size, rows), sms) * rows

    return min(configs(kernel, dim, ups), key=rows_in_turn)


def predicted_us(
    kernel: str, heads: int, size: int, walked: int, dim: int, ups: int, sums: int = 1
) -> float:
    """Time of one launch on an H200, predicted and not measured.

    Tiles take turns on the multiprocessors. One takes as long as its matmuls or its
    activations, whichever is more, at 0.7 of the chip's rate; all together no less than
    the walked tiles take to come from L2, and every array to and from memory. 2 us pass
    before the first tile and after the last one.

    size, walked: of the held and of the walked axis.
    sums: how many gradients a launch for the weights makes.
    """
    config = choose(kernel, heads, size, dim, ups)
    rows = config.rows * config.parts
    blocks = heads * pl.cdiv(size, rows)
    turns = pl.cdiv(blocks, multiprocessors())
    products, tiles, held = {
        "forward": (ups + 1, ups + 1, 2),
        "backward_x": (2 * ups + 1, ups + 1, 3),
        "backward_w": (ups + 1 + sums, 2, ups + 1 + sums),
    }[kernel]
    clocks = rows * walked * max(products * dim / MACS, 1 / MUFU_OPS)
    from_l2 = blocks * tiles * walked * dim * 2 / L2_BYTES
    moved = heads * dim * 2 * (held * size + tiles * walked)
    from_memory = moved / MEMORY_BYTES / MEMORY_RATE
    computed = turns * clocks / CLOCKS / MATMUL_RATE
    return LAUNCH_US + max(computed, from_l2, from_memory)


def predicted_faster(heads: int, batch: int, dim: int, hidden: int, ups: int) -> bool:
    """Whether the forward is predicted to beat XLA's, which stores the hidden layer.

    XLA launches each matmul and the activation, which reads and writes it.
    """
    ours = predicted_us("forward", heads, batch, hidden, dim, ups)
    layer, tokens = heads * batch * hidden, heads * batch * dim
    weights = heads * dim * hidden
    products = layer * dim / (MACS * multiprocessors() * CLOCKS * MATMUL_RATE)
    moved = {"up": tokens + weights + layer, "down": layer + weights + tokens}
    rate = MEMORY_BYTES * MEMORY_RATE
    matmuls = [max(products, 2 * moved["up"] / rate)] * ups
    matmuls.append(max(products, 2 * moved["down"] / rate))
    activation = 2 * (ups + 1) * layer / rate
    return ours < sum(matmuls) + activation + LAUNCH_US * (ups + 2)


def unsupported(
    x: jax.Array | jax.ShapeDtypeStruct, ups: Sequence[jax.Array], *, on_hopper: bool
) -> str | None:
    """Why the kernel cannot run this, or None if it can."""
    dim, hidden = ups[0].shape[1:]
    step = TMA_ROW_BYTES // x.dtype.itemsize
    largest = MAX_DIM if len(ups) == 1 else MAX_GATED_DIM
    if str(x.dtype) not in DTYPES:
        return f"dtype must be {' or '.join(DTYPES)} for mosaic_gpu, got {x.dtype}"
    if not step <= dim <= largest or dim % step:
        return (
            f"dim must be a multiple of {step} from {step} to {largest} for "
            f"mosaic_gpu{' with w_gate' * (len(ups) - 1)}, got {dim}"
        )
    if hidden % step:
        return f"hidden must be a multiple of {step} for mosaic_gpu, got {hidden}"
    if 0 in x.shape or hidden == 0:
        return f"no axis may be empty for mosaic_gpu, got {x.shape} and {hidden}"
    if not on_hopper:
        return "mosaic_gpu needs an H100 or H200, and the default device is none"
    return None


def mlp(x, ups, w2, activation):
    """act(x w1) w2 for each head, or (act(x w_gate) * x w1) w2 with two `ups`."""
    x, w2, *ups = vary_alike([x, w2, *ups])
    return _mlp(x, tuple(ups), w2, activation)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mlp(x, ups, w2, activation):
    return forward(activation)(x, *ups, w2)


def _mlp_fwd(x, ups, w2, activation):
    return _mlp(x, ups, w2, activation), (x, ups, w2)


def _mlp_bwd(activation, saved, dy):
    x, ups, w2 = saved
    args = (x, *ups, w2, dy)
    dx = backward_x(activation)(*args)
    passes = weight_passes(x.shape[-1], len(ups))
    *d_ups, dw2 = (dw for p in passes for dw in backward_w(activation, p)(*args))
    return dx, tuple(d.mT for d in d_ups), dw2


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


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


def forward(activation: str, config: Config | None = None):
    """The forward's kernel, of x, one matrix or two, and w2."""
    return _over_heads(partial(_forward, activation, config))


def backward_x(activation: str, config: Config | None = None):
    """The kernel of dx, of the forward's arguments and dy."""
    return _over_heads(partial(_backward_x, activation, config))


def backward_w(activation: str, wanted: tuple[int, ...], config: Config | None = None):
    """The kernel of those weights' gradients, transposed but for w2's."""
    return _over_heads(partial(_backward_w, activation, wanted, config))


def _hidden(activation, z):
    value = IN_KERNEL[activation].value(z[0])
    return value if len(z) == 1 else value * z[1]


def _d_z(activation, z, d_hidden):
    value, derivative = IN_KERNEL[activation]
    if len(z) == 1:
        return [d_hidden * derivative(z[0])]
    return [d_hidden * z[1] * derivative(z[0]), d_hidden * value(z[0])]


def _forward(activation, config, x, *weights):
    heads, batch, dim = x.shape
    *ups, w2 = weights
    down = len(ups)
    config = config or choose("forward", heads, batch, dim, len(ups))
    tile = plgpu.ACC((config.rows, config.columns), jnp.float32)

    def body(held, ring):
        (x,) = held
        z = dots(*((x, ring.wait(n, 0)) for n in range(down)))
        for n in range(down):
            ring.release(n, 0)

        def step(i, carry):
            y, *z = carry

            def overlap(*ahead):
                # In flight during the activation of this tile.
                for n in range(down):
                    plgpu.wgmma(ahead[n], x, ring.wait(n, i + 1))
                hidden = _hidden(activation, z).astype(x.dtype)
                added = add_dots(y, (hidden, ring.wait(down, i)))
                return added, *(acc[...] for acc in ahead)

            carry = pl.run_scoped(overlap, *[tile] * down)
            for n in range(down):
                ring.release(n, i + 1)
            ring.release(down, i)
            return carry

        start = zeros(config.rows, x.shape[1]), *z
        y, *z = lax.fori_loop(0, ring.count - 1, step, start)
        hidden = _hidden(activation, z).astype(x.dtype)
        y = add_dots(y, (hidden, ring.wait(down, ring.count - 1)))
        ring.release(down, ring.count - 1)
        return [y]

    walked = [*(Operand(w, 2) for w in ups), Operand(w2, 1)]
    name = "flash_mlp_forward"
    return walk(body, config, [Operand(x, 1)], walked, 1, name)[0]


def _backward_x(activation, config, x, *others):
    heads, batch, dim = x.shape
    *ups, w2, dy = others
    down = len(ups)
    config = config or choose("backward_x", heads, batch, dim, len(ups))

    def body(held, ring):
        dy, x = held

        def step(i, dx):
            ups = [ring.wait(n, i) for n in range(down)]
            w2 = ring.wait(down, i)
            *z, d_hidden = dots(*((x, up) for up in ups), (dy, w2.transpose((1, 0))))
            ring.release(down, i)
            d_z = [d.astype(x.dtype) for d in _d_z(activation, z, d_hidden)]
            transposed = [up.transpose((1, 0)) for up in ups]
            dx = add_dots(dx, *zip(d_z, transposed, strict=True))
            for n in range(down):
                ring.release(n, i)
            return dx

        return [lax.fori_loop(0, ring.count, step, zeros(config.rows, x.shape[1]))]

    held = [Operand(dy, 1), Operand(x, 1)]
    walked = [*(Operand(w, 2) for w in ups), Operand(w2, 1)]
    return walk(body, config, held, walked, 1, "flash_mlp_backward_x")[0]


def _backward_w(activation, wanted, config, x, *others):
    """Hidden features are the rows, so that only views of SMEM are transposed."""
    heads, batch, dim = x.shape
    *ups, w2, dy = others
    down, hidden = len(ups), w2.shape[1]
    config = config or choose("backward_w", heads, hidden, dim, len(ups))

    def body(held, ring):
        *ups, w2 = held

        def step(i, sums):
            x, dy = ring.wait(0, i), ring.wait(1, i)
            pairs = [(up.transpose((1, 0)), x.transpose((1, 0))) for up in ups]
            if wanted == (down,):
                z = dots(*pairs)
                factors = {}
            else:
                *z, d_hidden = dots(*pairs, (w2, dy.transpose((1, 0))))
                factors = dict(enumerate(_d_z(activation, z, d_hidden)))
            factors[down] = _hidden(activation, z)
            added = [
                add_dots(a, (factors[n].astype(w2.dtype), dy if n == down else x))
                for a, n in zip(sums, wanted, strict=True)
            ]
            ring.release(0, i)
            ring.release(1, i)
            return added

        start = [zeros(config.rows, w2.shape[1]) for _ in wanted]
        return lax.fori_loop(0, ring.count, step, start)

    held = [*(Operand(w, 2) for w in ups), Operand(w2, 1)]
    walked = [Operand(x, 1), Operand(dy, 1)]
    name = f"flash_mlp_backward_w{''.join(map(str, wanted))}"
    return walk(body, config, held, walked, len(wanted), name)
