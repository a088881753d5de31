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
from ..._mosaic.base import (
    IN_KERNEL,
    SMEM_BYTES,
    add_dots,
    dots,
    pad_to,
    plgpu,
    round_up,
    zeros,
)
from ..._mosaic.batching import over_heads
from ..._mosaic.launch import COLUMN_STEP, CONTRACTED_STEP, ROW_STEP, WalkTiles
from ..._mosaic.matmul import SPARE_BYTES
from .walk import HeadTiles, WalkedSteps, walk

MAX_DIM = 256
# The largest dim of the gated form: its tiles take up to twice as much shared memory.
MAX_GATED_DIM = 192

# Rows of a held tile of one warpgroup, the fewest that a wgmma has.
ROWS = 64
# Columns of a walked tile, by kernel and up to which dim. They are the largest that
# spill no register, which were the fastest on an H200.
WALKED_COLUMNS = {
    "forward": ((128, 128), (224, 64), (256, 32)),
    "backward_x": ((64, 128), (128, 64), (256, 32)),
    "backward_w": ((96, 64), (256, 32)),
}
GATED_WALKED_COLUMNS = ((64, 64), (256, 32))
# Up to this dim there are held tiles of 128 rows too, for an ungated forward.
WIDE_DIM = 96
# Up to this dim both warpgroups can share the rows of a tile, and do where blocks are
# few: their sums have to fit in registers beside those of the other one.
SPLIT_DIM = {"forward": 128, "backward_x": 128, "backward_w": 96}
# Walked columns of these: the addresses of one more ring take registers too, where the
# backward of two inputs has it. Those have dims up to 32 only.
SPLIT_COLUMNS = 64
PAIR_SPLIT_COLUMNS = 32
NUMBER_BYTES = 2


def configs(kernel: str, dim: int, ups: int, inputs: int = 1) -> tuple[WalkTiles, ...]:
    """The tiles to choose from, the largest first."""
    gated = ups == 2
    table = GATED_WALKED_COLUMNS if gated else WALKED_COLUMNS[kernel]
    columns = next(columns for largest, columns in table if dim <= largest)
    found = [WalkTiles(ROWS, columns, held=_held(kernel, dim, columns, ups, inputs))]
    if kernel == "forward" and not gated and dim <= WIDE_DIM:
        found.insert(0, WalkTiles(2 * ROWS, 64))
    if dim <= SPLIT_DIM[kernel]:
        is_pair = inputs == 2 and kernel != "forward"
        most = PAIR_SPLIT_COLUMNS if is_pair else SPLIT_COLUMNS
        found.append(WalkTiles(ROWS, min(columns, most), steps=4, split=True, held=1))
    return tuple(found)


def _held(kernel: str, dim: int, columns: int, ups: int, inputs: int) -> int:
    """How many held tiles are in flight: two where shared memory has room for them."""
    held, walked = {
        "forward": (inputs, ups + 1),
        "backward_x": (inputs + 1, ups + 1),
        "backward_w": (ups + 1, inputs + 1),
    }[kernel]
    tiles = WalkTiles(ROWS, columns, held=2)
    rows = tiles.held * tiles.parts * held * ROWS + tiles.steps * walked * columns
    return 2 if rows * dim * NUMBER_BYTES <= SMEM_BYTES - SPARE_BYTES else 1


def weight_passes(dim: int, ups: int) -> tuple[tuple[int, ...], ...]:
    """The launches that make the weights' gradients, and which ones each makes.

    As many as have their sums in registers: the first matrices by number, then w2.
    """
    names = range(ups + 1)
    together = 2 if dim <= (128 if ups == 1 else 96) else 1
    return tuple(tuple(names[i : i + together]) for i in range(0, len(names), together))


def choose_tiles(
    kernel: str, heads: int, size: int, dim: int, ups: int, inputs: int = 1
) -> WalkTiles:
    """The tiles of which a multiprocessor has the fewest rows to compute."""
    sms = device.multiprocessors()

    def rows_in_turn(config: WalkTiles) -> int:
        rows = config.rows * config.parts
        return pl.cdiv(heads * pl.cdiv(size, rows), sms) * rows

    return min(configs(kernel, dim, ups, inputs), key=rows_in_turn)


def unsupported(x: Any, w1: Any, *, gated: bool = False) -> str | None:
    """Why the kernel cannot run this, or None if it can."""
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
    """act(x w1) w2 for each head, or (act(x w_gate) * x w1) w2 with two `ups`.

    x: (heads, batch, dim), or (heads, batch, 2 dim), of which each matrix has half;
        then dim is at most `thresholds.LARGEST_FLASH_RANK`.
    """
    (heads, batch), (dim, hidden) = x.shape[:2], ups[0].shape[1:]
    rows, columns, features = padded_sizes(batch, dim, hidden)
    parts = x.reshape(heads, -1, dim)
    x = pad_to(parts, parts.shape[1], columns).reshape(heads, batch, -1)
    x, w2 = pad_to(x, rows, x.shape[2]), pad_to(w2, features, columns)
    x, w2, *ups = vary_alike(x, w2, *(pad_to(w, columns, features) for w in ups))
    return _mlp(x, tuple(ups), w2, activation)[:, :batch, :dim]


def padded_sizes(batch: int, dim: int, hidden: int) -> tuple[int, int, int]:
    """What the tiles of shared memory are made of divides them."""
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
    """The forward's kernel, of x, one matrix or two, and w2."""
    return over_heads(partial(_forward, activation=activation, config=config))


def backward_x(activation: str, config: WalkTiles | None = None):
    """The kernel of the inputs' gradients, of the forward's arguments and dy."""
    return over_heads(partial(_backward_x, activation=activation, config=config))


def backward_w(
    activation: str, wanted: tuple[int, ...], config: WalkTiles | None = None
):
    """The kernel of those weights' gradients, transposed but for w2's."""
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
    """Which input the first matrix number `up` multiplies: its own, or the only one."""
    return up if inputs > 1 else 0


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The sums of a tile of tokens: y, over the hidden features that are walked.

    ups: how many first matrices. Walked are these and then w2.
    rows, columns, dim: of the tiles of tokens, of hidden features, and of y.
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
    """So many sums of all steps; `add`: from a step and the sums to the next ones."""
    start = [zeros(*shape) for _ in range(outs)]
    return lax.fori_loop(0, steps.count, add, start)


@dataclasses.dataclass(frozen=True)
class _InputGradients:
    """The sums of a tile of tokens: the gradients of the inputs.

    Held are dy and the inputs; walked are the first matrices and then w2.
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

    Held are the first matrices and w2; walked are the inputs and then dy. Hidden
    features are the rows, so that only views of shared memory are transposed.
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
