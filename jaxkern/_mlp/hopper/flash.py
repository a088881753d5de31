"""The multi-head MLP on Hopper: the hidden layer stays on the chip, in both passes.

The forward holds tokens and walks the hidden axis: while the activation of one tile
runs on the special function units, the next tile's matmul runs on the tensor cores.

The backward computes the hidden layer again, twice: for dx it holds tokens and walks
the hidden axis, for the weights it holds hidden features and walks the tokens. That is
seven matmuls where five would do. One pass of five makes two sums at once, over hidden
features for dx and over tokens for the weights, and a block can keep one of them:

- if it keeps the weights' of 128 hidden features, float32 partial sums of dx go through
  memory, 8 bytes x tokens x dim x hidden / 128 a head. At (32, 4096, 64, 512) that is
  268 MB, 56 us at 4.8 TB/s, to save two matmuls of 17 us at the tensor cores' rate;
- to keep dx it needs all hidden features, and the weights' sums are 256 KB in float32
  at dim 64 and hidden 512: more than a block's registers or shared memory;
- atomics in float32 have the traffic of the first, and a result that depends on the
  order of arrival.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._core import device, h200
from ..._core.sharding import vary_alike
from ..._mosaic.base import IN_KERNEL, SMEM_BYTES, add_dots, dots, plgpu, zeros
from ..._mosaic.batching import over_heads
from ..._mosaic.launch import COLUMN_STEP, CONTRACTED_STEP, ROW_STEP, WalkTiles
from .walk import Operand, walk

DTYPES = ("bfloat16", "float16")
MAX_DIM = 256
# Of the gated form, by its inputs: its tiles take up to twice as much shared memory.
MAX_GATED_DIM = {1: 192, 2: 128}


def configs(kernel: str, dim: int, ups: int, inputs: int = 1) -> tuple[WalkTiles, ...]:
    """The tiles to choose from, the largest first.

    The largest that spill no register, which were the fastest on an H200.
    """
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
        "forward": (inputs, ups + 1),
        "backward_x": (inputs + 1, ups + 1),
        "backward_w": (ups + 1, inputs + 1),
    }[kernel]
    needed = 2 * 2 * held * tile_bytes + 2 * walked * columns * tile_bytes // 64
    normal = WalkTiles(64, columns, held=2 if needed <= SMEM_BYTES - 2048 else 1)
    # The addresses of one more ring take registers too.
    most = 32 if (inputs, kernel != "forward") == (2, True) else 64
    half = WalkTiles(64, min(columns, most), steps=4, split=True, held=1)
    wide = (
        (WalkTiles(128, 64),) if (kernel, ups) == ("forward", 1) and dim <= 96 else ()
    )
    splits = dim <= (96 if kernel == "backward_w" else 128)
    return (*wide, normal, half) if splits else (*wide, normal)


def weight_passes(dim: int, ups: int) -> tuple[tuple[int, ...], ...]:
    """The launches that make the weights' gradients, and which ones each makes.

    As many as have their sums in registers: the first matrices by number, then w2.
    """
    names = range(ups + 1)
    together = 2 if dim <= (128 if ups == 1 else 96) else 1
    return tuple(tuple(names[i : i + together]) for i in range(0, len(names), together))


def input_passes(dim: int, inputs: int) -> tuple[tuple[int, ...], ...]:
    """The launches that make the inputs' gradients, and which ones each makes."""
    names = tuple(range(inputs))
    return (names,) if dim <= 64 else tuple((n,) for n in names)


def choose(
    kernel: str, heads: int, size: int, dim: int, ups: int, inputs: int = 1
) -> WalkTiles:
    """The tiles of which a multiprocessor has the fewest rows to compute."""
    sms = device.multiprocessors()

    def rows_in_turn(config: WalkTiles) -> int:
        rows = config.rows * config.parts
        return pl.cdiv(heads * pl.cdiv(size, rows), sms) * rows

    return min(configs(kernel, dim, ups, inputs), key=rows_in_turn)


def predicted_us(
    kernel: str,
    heads: int,
    size: int,
    walked: int,
    dim: int,
    ups: int,
    sums: int = 1,
    inputs: int = 1,
) -> float:
    """Time of one launch on an H200, predicted: within a fourth of what they took.

    Tiles take turns on the multiprocessors. One takes as long as its matmuls and its
    activations, of which little is hidden (silu takes 43 us where relu takes 31); all
    together no less than the walked tiles take to come from L2, and every array to and
    from memory. 2 us pass before the first tile and after the last one.

    size, walked: of the held and of the walked axis.
    sums: how many gradients a launch for the weights makes.
    """
    config = choose(kernel, heads, size, dim, ups, inputs)
    rows = config.rows * config.parts
    blocks = heads * pl.cdiv(size, rows)
    turns = pl.cdiv(blocks, device.multiprocessors())
    products, tiles, held = {
        "forward": (ups + 1, ups + 1, inputs + 1),
        "backward_x": (2 * ups + 1, ups + 1, 2 * inputs + 1),
        "backward_w": (ups + 1 + sums, inputs + 1, ups + 1 + sums),
    }[kernel]
    matmuls = products * dim / h200.MACS_PER_CLOCK / h200.MATMUL_SHARE
    clocks = rows * walked * (matmuls + 1 / h200.MUFU_PER_CLOCK)
    from_l2 = blocks * tiles * walked * dim * 2 / h200.L2_BYTES_PER_US
    moved = heads * dim * 2 * (held * size + tiles * walked)
    from_memory = moved / h200.MEMORY_BYTES_PER_US / h200.MEMORY_SHARE
    computed = turns * clocks / h200.CLOCKS_PER_US
    return h200.LAUNCH_US + max(computed, from_l2, from_memory)


def padding_us(
    heads: int, batch: int, dim: int, hidden: int, ups: int, inputs: int
) -> float:
    """Of the copies that `mlp` makes; each array is read and written."""
    rows, columns, features = padded_sizes(batch, dim, hidden)
    numbers, copies = 0, 0
    if (rows, columns) != (batch, dim):
        numbers, copies = (inputs + 1) * rows * columns, 2
    if (columns, features) != (dim, hidden):
        numbers, copies = numbers + (ups + 1) * columns * features, copies + ups + 1
    moved = 2 * 2 * heads * numbers / (h200.MEMORY_BYTES_PER_US * h200.MEMORY_SHARE)
    return moved + copies * h200.LAUNCH_US


def unsupported(
    x: jax.Array | jax.ShapeDtypeStruct,
    ups: Sequence[jax.Array | jax.ShapeDtypeStruct],
) -> str | None:
    """Why the kernel cannot run this, or None if it can."""
    dim, hidden = ups[0].shape[1:]
    largest = (
        MAX_DIM if len(ups) == 1 else MAX_GATED_DIM[2 if x.shape[2] == 2 * dim else 1]
    )
    if str(x.dtype) not in DTYPES:
        return f"dtype must be {' or '.join(DTYPES)} for mosaic_gpu, got {x.dtype}"
    if dim > largest:
        gated = " with w_gate" * (len(ups) - 1)
        return f"dim must be at most {largest} for mosaic_gpu{gated}, got {dim}"
    if 0 in x.shape or hidden == 0:
        return f"no axis may be empty for mosaic_gpu, got {x.shape} and {hidden}"
    return None


def mlp(x, ups, w2, activation):
    """act(x w1) w2 for each head, or (act(x w_gate) * x w1) w2 with two `ups`.

    x: (heads, batch, dim), or (heads, batch, 2 dim), of which each matrix has half.
    """
    (heads, batch), (dim, hidden) = x.shape[:2], ups[0].shape[1:]
    rows, columns, features = padded_sizes(batch, dim, hidden)
    parts = x.reshape(heads, -1, dim)
    x = _pad(parts, parts.shape[1], columns).reshape(heads, batch, -1)
    x, w2 = _pad(x, rows, x.shape[2]), _pad(w2, features, columns)
    ups = [_pad(w, columns, features) for w in ups]
    x, w2, *ups = vary_alike(x, w2, *ups)
    return _mlp(x, tuple(ups), w2, activation)[:, :batch, :dim]


def padded_sizes(batch: int, dim: int, hidden: int) -> tuple[int, ...]:
    """What the tiles of shared memory are made of divides them."""
    sizes = (batch, ROW_STEP), (dim, CONTRACTED_STEP), (hidden, COLUMN_STEP)
    return tuple(pl.cdiv(size, step) * step for size, step in sizes)


def _pad(a, rows, columns):
    """With zeros at the end, which add nothing to any result."""
    missing = rows - a.shape[1], columns - a.shape[2]
    return jnp.pad(a, [(0, 0), (0, missing[0]), (0, missing[1])]) if any(missing) else a


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mlp(x, ups, w2, activation):
    return forward(activation)(x, *ups, w2)


def _mlp_fwd(x, ups, w2, activation):
    return _mlp(x, ups, w2, activation), (x, ups, w2)


def _mlp_bwd(activation, saved, dy):
    x, ups, w2 = saved
    dim = w2.shape[2]
    args = (x, *ups, w2, dy)
    passes = input_passes(dim, x.shape[2] // dim)
    dx = [d for p in passes for d in backward_x(activation, p)(*args)]
    passes = weight_passes(dim, len(ups))
    *d_ups, dw2 = (dw for p in passes for dw in backward_w(activation, p)(*args))
    return jnp.concatenate(dx, axis=2), tuple(d.mT for d in d_ups), dw2


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def forward(activation: str, config: WalkTiles | None = None):
    """The forward's kernel, of x, one matrix or two, and w2."""
    return over_heads(partial(_forward, activation, config))


def backward_x(
    activation: str, wanted: tuple[int, ...] = (0,), config: WalkTiles | None = None
):
    """The kernel of those inputs' gradients, of the forward's arguments and dy."""
    return over_heads(partial(_backward_x, activation, wanted, config))


def backward_w(
    activation: str, wanted: tuple[int, ...], config: WalkTiles | None = None
):
    """The kernel of those weights' gradients, transposed but for w2's."""
    return over_heads(partial(_backward_w, activation, wanted, config))


def _hidden(activation, z):
    value = IN_KERNEL[activation].value(z[0])
    return value if len(z) == 1 else value * z[1]


def _d_z(activation, z, d_hidden):
    value, derivative = IN_KERNEL[activation]
    if len(z) == 1:
        return [d_hidden * derivative(z[0])]
    return [d_hidden * z[1] * derivative(z[0]), d_hidden * value(z[0])]


def _inputs(x, dim):
    parts = x.shape[2] // dim
    return [Operand(x, 1, part, parts) for part in range(parts)]


def _for_each(inputs, ups):
    """The input of each of `ups`: there is one for all, or one for each."""
    return inputs if len(inputs) == len(ups) else [inputs[0]] * len(ups)


def _forward(activation, config, x, *weights):
    *ups, w2 = weights
    heads, batch, dim = *x.shape[:2], w2.shape[2]
    inputs, down = _inputs(x, dim), len(ups)
    config = config or choose("forward", heads, batch, dim, down, len(inputs))
    tile = plgpu.ACC((config.rows, config.columns), jnp.float32)

    def body(held, ring):
        xs = _for_each(held, ups)
        z = dots(*((x, ring.wait(n, 0)) for n, x in enumerate(xs)))
        for n in range(down):
            ring.release(n, 0)

        def step(i, carry):
            y, *z = carry

            def overlap(*ahead):
                # In flight during the activation of this tile.
                for n, x in enumerate(xs):
                    plgpu.wgmma(ahead[n], x, ring.wait(n, i + 1))
                hidden = _hidden(activation, z).astype(w2.dtype)
                added = add_dots(y, (hidden, ring.wait(down, i)))
                return added, *(acc[...] for acc in ahead)

            carry = pl.run_scoped(overlap, *[tile] * down)
            for n in range(down):
                ring.release(n, i + 1)
            ring.release(down, i)
            return carry

        start = zeros(config.rows, dim), *z
        y, *z = lax.fori_loop(0, ring.count - 1, step, start)
        hidden = _hidden(activation, z).astype(w2.dtype)
        y = add_dots(y, (hidden, ring.wait(down, ring.count - 1)))
        ring.release(down, ring.count - 1)
        return [y]

    walked = [*(Operand(w, 2) for w in ups), Operand(w2, 1)]
    name = "flash_mlp_forward"
    return walk(body, config, inputs, walked, 1, name)[0]


def _backward_x(activation, wanted, config, x, *others):
    *ups, w2, dy = others
    heads, batch, dim = dy.shape
    inputs, down = _inputs(x, dim), len(ups)
    config = config or choose("backward_x", heads, batch, dim, down, len(inputs))

    def body(held, ring):
        dy, *xs = held
        numbers = _for_each(range(len(inputs)), ups)

        def step(i, sums):
            ups = [ring.wait(n, i) for n in range(down)]
            w2 = ring.wait(down, i)
            pairs = [*zip(_for_each(xs, ups), ups, strict=True)]
            needed = pairs[:1] if wanted == (1,) else pairs
            *z, d_hidden = dots(*needed, (dy, w2.transpose((1, 0))))
            ring.release(down, i)
            if wanted == (1,):
                d_z = [None, d_hidden * IN_KERNEL[activation].value(z[0])]
            else:
                d_z = _d_z(activation, z, d_hidden)
            transposed = [up.transpose((1, 0)) for up in ups]
            added = []
            for wanted_sum, number in zip(sums, wanted, strict=True):
                of_input = [n for n in range(down) if numbers[n] == number]
                pairs = [(d_z[n].astype(dy.dtype), transposed[n]) for n in of_input]
                added.append(add_dots(wanted_sum, *pairs))
            for n in range(down):
                ring.release(n, i)
            return added

        start = [zeros(config.rows, dim) for _ in wanted]
        return lax.fori_loop(0, ring.count, step, start)

    held = [Operand(dy, 1), *inputs]
    walked = [*(Operand(w, 2) for w in ups), Operand(w2, 1)]
    name = f"flash_mlp_backward_x{''.join(map(str, wanted)) * (len(inputs) > 1)}"
    return walk(body, config, held, walked, len(wanted), name)


def _backward_w(activation, wanted, config, x, *others):
    """Hidden features are the rows, so that only views of SMEM are transposed."""
    *ups, w2, dy = others
    heads, hidden, dim = w2.shape
    inputs, down = _inputs(x, dim), len(ups)
    config = config or choose("backward_w", heads, hidden, dim, down, len(inputs))

    def body(held, ring):
        *ups, w2 = held

        def step(i, sums):
            *xs, dy = (ring.wait(n, i) for n in range(len(inputs) + 1))
            xs = _for_each(xs, ups)
            pairs = [
                (up.transpose((1, 0)), x.transpose((1, 0)))
                for up, x in zip(ups, xs, strict=True)
            ]
            if wanted == (down,):
                z = dots(*pairs)
                factors = {}
            else:
                *z, d_hidden = dots(*pairs, (w2, dy.transpose((1, 0))))
                factors = dict(enumerate(_d_z(activation, z, d_hidden)))
            factors[down] = _hidden(activation, z)
            added = [
                add_dots(a, (factors[n].astype(w2.dtype), [*xs, dy][n]))
                for a, n in zip(sums, wanted, strict=True)
            ]
            for n in range(len(inputs) + 1):
                ring.release(n, i)
            return added

        start = [zeros(config.rows, w2.shape[1]) for _ in wanted]
        return lax.fori_loop(0, ring.count, step, start)

    held = [*(Operand(w, 2) for w in ups), Operand(w2, 1)]
    walked = [*inputs, Operand(dy, 1)]
    name = f"flash_mlp_backward_w{''.join(map(str, wanted))}"
    return walk(body, config, held, walked, len(wanted), name)
