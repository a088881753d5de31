"""The multi-head MLP on Hopper: the hidden layer stays on the chip, in both passes.

The frame, its barriers and who waits for whom are drawn in `walk`. Here is what a
computing warpgroup does with a held tile, without a gate. The forward holds 64 or 128
tokens of x and walks along the hidden axis, with W1 and W2 in one ring each:

    tensor cores  z0 = x W1[0] | z1 = x W1[1] | y += h0 W2[0] | z2 = x W1[2] | ...
    CUDA, MUFU                 | h0 = act(z0) |               | h1 = act(z1) | ...

    step i   wait W1[i + 1], issue z[i + 1]; compute h[i] meanwhile, in registers
             wait W2[i], issue y += h[i] W2[i]; await both, release W1[i + 1] and W2[i]

The backward computes the hidden layer again in each of its launches. The one for dx
holds x and dy of 64 tokens and walks along W1 and W2. The one for the weights (or more
of them, see `weight_passes`) holds W1 and W2 of 64 hidden features and walks along x
and dy; hidden features are the rows of all its products:

    dx         z = x W1, dh = dy W2^T; await both, release W2
               dz = dh act'(z); dx += dz W1^T; await it, release W1
    dW1, dW2   z^T = W1^T x^T, dh^T = W2 dy^T; await both
               dz^T = dh^T act'(z^T), h^T = act(z^T)
               dW1^T += dz^T x; await it; dW2 += h^T dy; await it, release x and dy

In the backward nothing of one warpgroup overlaps: its activation runs after some of its
matmuls and before the others. Only the other warpgroup can use the tensor cores then.

Why these tiles: at dim 64, silu takes as long as both of the forward's matmuls, 1/16
clock of a multiprocessor for each hidden number (2 x 64 of 2048 multiply-adds a clock;
one of 16 special functions), so the forward must overlap them. A thread has 240
registers. At dim 64, the forward's y, z[i], z[i + 1] and h[i] take 32 + 64 + 64 + 32 of
them with 64 tokens and 128 columns, and 64 + 64 + 64 + 32 with 128 tokens and 64
columns. (32, 4096, 64, 512) in bfloat16 took 44 us for the forward, 58 for dx and 66
for the weights on an H200, and XLA 167 us for the forward and 440 for both passes
(`benchmarks/results/nvidia_h200/launches.json`, rows `flash (32,4096,64,512)`).

The backward's seven matmuls are two more than there would be in one pass. That makes
two sums at once, over hidden features for dx and over tokens for the weights, and a
block can keep one of them. The arithmetic, not measured:

- if it keeps the weights' sums for 128 hidden features, float32 partial sums of dx go
  through memory, 8 bytes x tokens x dim x hidden / 128 a head. At (32, 4096, 64, 512)
  that is 268 MB, 56 us at 4.8 TB/s, to save two matmuls of 17 us at the tensor cores'
  rate;
- if it keeps dx it needs all hidden features, and the weights' sums are 256 KiB in
  float32 at dim 64 and hidden 512: more than a block's registers or shared memory;
- atomics in float32 move as much as the first, and their result depends on the order of
  arrival.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._core import device
from ..._core.sharding import vary_alike
from ..._mosaic.base import IN_KERNEL, add_dots, dots, pad_to, plgpu, round_up, zeros
from ..._mosaic.batching import over_heads
from ..._mosaic.launch import COLUMN_STEP, CONTRACTED_STEP, ROW_STEP, WalkTiles
from .flash_tiles import choose_tiles, weight_passes
from .walk import HeadTiles, WalkedSteps, walk

# The largest dim. A result has `dim` columns, and wgmma has at most 256.
MAX_DIM = 256
# The largest dim of the gated form: its tiles take up to twice as much shared memory.
MAX_GATED_DIM = 192


def unsupported(x: Any, w1: Any, *, gated: bool = False) -> str | None:
    """Return why the kernel cannot run this, or None if it can."""
    dim = w1.shape[1]
    largest = MAX_GATED_DIM if gated else MAX_DIM
    if reason := device.unsupported_array("x", x):
        return reason
    if dim > largest:
        form = " with w_gate" if gated else ""
        return f"dim must be at most {largest} for mosaic_gpu{form}, got {dim}"
    return device.unsupported_array("w1", w1)


def mlp(
    x: jax.Array, ups: Sequence[jax.Array], w2: jax.Array, activation: str
) -> jax.Array:
    """Return act(x w1) w2 for each head, or (act(x w_gate) * x w1) w2 with two `ups`.

    x: (heads, batch, dim), or (heads, batch, 2 dim) with one half for each first
        matrix; then dim is at most `thresholds.LARGEST_FLASH_RANK`.
    ups: the first matrices, (heads, dim, hidden): w1, or w_gate and w1.
    w2: (heads, hidden, dim).
    """
    (heads, batch), (dim, hidden) = x.shape[:2], ups[0].shape[1:]
    rows, columns, features = padded_sizes(batch, dim, hidden)
    parts = x.reshape(heads, -1, dim)
    x = pad_to(parts, parts.shape[1], columns).reshape(heads, batch, -1)
    x, w2 = pad_to(x, rows, x.shape[2]), pad_to(w2, features, columns)
    x, w2, *ups = vary_alike(x, w2, *(pad_to(w, columns, features) for w in ups))
    return _mlp(x, tuple(ups), w2, activation)[:, :batch, :dim]


def padded_sizes(batch: int, dim: int, hidden: int) -> tuple[int, int, int]:
    """Round sizes up so that tiles of shared memory divide the arrays."""
    return (
        round_up(batch, ROW_STEP),
        round_up(dim, CONTRACTED_STEP),
        round_up(hidden, COLUMN_STEP),
    )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mlp(x, ups, w2, activation):
    return forward(activation)(x, *ups, w2)


def _mlp_fwd(x, ups, w2, activation):
    return _mlp(x, ups, w2, activation), (x, ups, w2)


def _mlp_bwd(activation, saved, dy):
    x, ups, w2 = saved
    dim = w2.shape[2]
    args = (x, *ups, w2, dy)
    dx = backward_x(activation)(*args)
    passes = weight_passes(dim, len(ups))
    *d_ups, dw2 = (dw for p in passes for dw in backward_w(activation, p)(*args))
    return jnp.concatenate(dx, axis=2), tuple(d.mT for d in d_ups), dw2


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def forward(activation: str, config: WalkTiles | None = None):
    """Return the kernel of the forward; it takes x, one first matrix or two, and w2."""
    return over_heads(partial(_forward, activation=activation, config=config))


def backward_x(activation: str, config: WalkTiles | None = None):
    """Return the kernel of the inputs' gradients.

    It takes the forward's arguments and then dy, and returns one array for each input.
    """
    return over_heads(partial(_backward_x, activation=activation, config=config))


def backward_w(
    activation: str, wanted: tuple[int, ...], config: WalkTiles | None = None
):
    """Return the kernel of the gradients of the weights `wanted`, by their numbers.

    It takes the forward's arguments and then dy. The gradients of first matrices come
    transposed, (heads, hidden, dim).
    """
    options = {"activation": activation, "wanted": wanted, "config": config}
    return over_heads(partial(_backward_w, **options))


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
    return [HeadTiles(x, 1, part, parts) for part in range(parts)]


def _input_of(up: int, inputs: int) -> int:
    """The number of the input that first matrix `up` multiplies."""
    return up if inputs > 1 else 0


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The sums of a tile of tokens: y, over the walked hidden features.

    The inputs are held. The first matrices and then w2 are walked.

    ups: how many first matrices.
    rows: tokens of the tile.
    columns: hidden features of a step.
    dim: columns of y.
    """

    activation: str
    ups: int
    rows: int
    columns: int
    dim: int
    dtype: Any

    def __call__(self, inputs: Sequence[Any], steps: WalkedSteps) -> list[Any]:
        xs = [inputs[_input_of(n, len(inputs))] for n in range(self.ups)]
        z = dots(*((x, steps.wait(n, 0)) for n, x in enumerate(xs)))
        for n in range(self.ups):
            steps.release(n, 0)

        def step(i, carry):
            y, *z = carry
            y, z = self._overlap(xs, steps, i, y, z)
            for n in range(self.ups):
                steps.release(n, i + 1)
            steps.release(self.ups, i)
            return y, *z

        start = zeros(self.rows, self.dim), *z
        y, *z = lax.fori_loop(0, steps.count - 1, step, start)
        y = self._add(y, z, steps, steps.count - 1)
        steps.release(self.ups, steps.count - 1)
        return [y]

    def _overlap(self, xs, steps: WalkedSteps, i, y, z):
        """Return y with step i's part, and z of the next step.

        The next step's products are in flight during the activation of this one.
        """

        def run(*ahead):
            for n, x in enumerate(xs):
                plgpu.wgmma(ahead[n], x, steps.wait(n, i + 1))
            added = self._add(y, z, steps, i)
            return added, [acc[...] for acc in ahead]

        tile = plgpu.ACC((self.rows, self.columns), jnp.float32)
        return pl.run_scoped(run, *[tile for _ in xs])

    def _add(self, y, z, steps: WalkedSteps, i):
        """Add to y the hidden features of step i, made of z, times their rows of w2."""
        hidden = _hidden(self.activation, z).astype(self.dtype)
        return add_dots(y, (hidden, steps.wait(self.ups, i)))


def _forward(x, *weights, activation: str, config: WalkTiles | None):
    *ups, w2 = weights
    heads, batch, dim = *x.shape[:2], w2.shape[2]
    inputs = _inputs(x, dim)
    tiles = config or choose_tiles("forward", heads, batch, dim, len(ups), len(inputs))
    body = _Forward(activation, len(ups), tiles.rows, tiles.columns, dim, w2.dtype)
    walked = [*(HeadTiles(w, 2) for w in ups), HeadTiles(w2, 1)]
    return walk(inputs, walked, body, outs=1, tiles=tiles, name="flash_mlp_forward")[0]


def _sum_over(steps: WalkedSteps, add: Any, outs: int, shape: tuple[int, int]):
    """Return `outs` sums over all steps.

    add: takes a step and the sums before it; returns the sums after it.
    """
    start = [zeros(*shape) for _ in range(outs)]
    return lax.fori_loop(0, steps.count, add, start)


@dataclasses.dataclass(frozen=True)
class _InputGradients:
    """The sums of a tile of tokens: the gradients of the inputs.

    dy and the inputs are held. The first matrices and then w2 are walked.
    """

    activation: str
    inputs: int
    ups: int
    rows: int
    dim: int

    def __call__(self, held: Sequence[Any], steps: WalkedSteps) -> list[Any]:
        add = partial(self._step, held, steps)
        return _sum_over(steps, add, self.inputs, (self.rows, self.dim))

    def _step(self, held, steps: WalkedSteps, i, sums):
        dy, *inputs = held
        ups = [steps.wait(n, i) for n in range(self.ups)]
        w2 = steps.wait(self.ups, i)
        numbers = [_input_of(n, self.inputs) for n in range(self.ups)]
        pairs = [(inputs[numbers[n]], up) for n, up in enumerate(ups)]
        *z, d_hidden = dots(*pairs, (dy, w2.transpose((1, 0))))
        steps.release(self.ups, i)
        d_z = _d_z(self.activation, z, d_hidden)
        added = []
        for number, its_sum in enumerate(sums):
            terms = [
                (d_z[n].astype(dy.dtype), up.transpose((1, 0)))
                for n, up in enumerate(ups)
                if numbers[n] == number
            ]
            added.append(add_dots(its_sum, *terms))
        for n in range(self.ups):
            steps.release(n, i)
        return added


def _backward_x(x, *others, activation: str, config: WalkTiles | None):
    *ups, w2, dy = others
    heads, batch, dim = dy.shape
    inputs = _inputs(x, dim)
    tiles = config or choose_tiles(
        "backward_x", heads, batch, dim, len(ups), len(inputs)
    )
    body = _InputGradients(activation, len(inputs), len(ups), tiles.rows, dim)
    walked = [*(HeadTiles(w, 2) for w in ups), HeadTiles(w2, 1)]
    name = "flash_mlp_backward_x" if len(inputs) == 1 else "flash_mlp_backward_x01"
    held = [HeadTiles(dy, 1), *inputs]
    return walk(held, walked, body, outs=len(inputs), tiles=tiles, name=name)


@dataclasses.dataclass(frozen=True)
class _WeightGradients:
    """The sums of a tile of hidden features: the gradients of the `wanted` weights.

    The first matrices and w2 are held. The inputs and then dy are walked. Hidden
    features are the rows of all products, so that only views of shared memory are
    transposed: a kernel cannot transpose what is in registers.
    """

    activation: str
    wanted: tuple[int, ...]
    inputs: int
    rows: int
    dim: int

    def __call__(self, held: Sequence[Any], steps: WalkedSteps) -> list[Any]:
        add = partial(self._step, held, steps)
        return _sum_over(steps, add, len(self.wanted), (self.rows, self.dim))

    def _step(self, held, steps: WalkedSteps, i, sums):
        *ups, w2 = held
        *inputs, dy = (steps.wait(n, i) for n in range(self.inputs + 1))
        xs = [inputs[_input_of(n, self.inputs)] for n in range(len(ups))]
        pairs = [
            (up.transpose((1, 0)), x.transpose((1, 0)))
            for up, x in zip(ups, xs, strict=True)
        ]
        if self.wanted == (len(ups),):
            z = dots(*pairs)
            factors = {}
        else:
            *z, d_hidden = dots(*pairs, (w2, dy.transpose((1, 0))))
            factors = dict(enumerate(_d_z(self.activation, z, d_hidden)))
        factors[len(ups)] = _hidden(self.activation, z)
        added = [
            add_dots(wanted_sum, (factors[n].astype(w2.dtype), [*xs, dy][n]))
            for wanted_sum, n in zip(sums, self.wanted, strict=True)
        ]
        for n in range(self.inputs + 1):
            steps.release(n, i)
        return added


def _backward_w(x, *others, activation: str, wanted, config: WalkTiles | None):
    *ups, w2, dy = others
    heads, hidden, dim = w2.shape
    inputs = _inputs(x, dim)
    tiles = config or choose_tiles(
        "backward_w", heads, hidden, dim, len(ups), len(inputs)
    )
    body = _WeightGradients(activation, wanted, len(inputs), tiles.rows, dim)
    held = [*(HeadTiles(w, 2) for w in ups), HeadTiles(w2, 1)]
    walked = [*inputs, HeadTiles(dy, 1)]
    name = f"flash_mlp_backward_w{''.join(map(str, wanted))}"
    return walk(held, walked, body, outs=len(wanted), tiles=tiles, name=name)
