"""The kernel of products with masked weights.

It computes y_b = x_b (W * m_b), and dx_b = dy_b (W * m_b)^T, transposed: a
block makes up to 256 tokens x 128 features of a sample's result, each of its two
warpgroups the 64 features whose weights it multiplies by their mask in registers. These
are the left factor of its wgmma, so nothing masked is stored, and the warpgroups do not
wait for each other; the next step's are made while that runs. A thread has 128 sums,
and 32 numbers each of W and of the mask. Of 210 KB, two steps of tokens and three of
weights with float32 logits are in flight. Where there are fewer tiles than
multiprocessors, the contracted axis is split among blocks, whose results XLA adds.

For a backward the forward writes the masks it has made, as bits, where a block has the
first tokens of a sample: a 32nd of the bytes of float32 logits for two reads of these.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._core import device, h200
from ..._mosaic.base import SMEM_BYTES, buffer, plgpu
from ..._mosaic.batching import over_heads
from ..._mosaic.launch import COMPUTE, Ring, Roles, Slots, launch
from ..estimators import Rule
from ..packed import WORD

# What a mask is made of: logits, on where they are positive, by the estimators of which
# the gradients' kernel knows the slope; numbers, by which W is multiplied; or bits, 32
# rows of W to a word.
Kind = Rule | Literal["mask", "bits"]
# Rows of a wgmma: the features that a warpgroup masks and multiplies.
PIECE = 64
# Features of a product's tile, of both warpgroups.
FEATURES = 128
# What is contracted in a step.
DEPTH = 64
# Tokens of a product's tile, and parts of the contracted axis, to choose from.
TILE_TOKENS = (256, 128, 64)
SPLITS = (1, 2, 4, 8)
# Shared memory of barriers.
RESERVED_BYTES = 512
# Shared memory that JAX adds where there are sums over lanes.
LANE_SUMS_BYTES = 2048
# What launches took on an H200 (`nvidia_h200/launches.json`): a step with logits or
# numbers, and with bits. Steps wait for shared memory, not for the tensor cores.
STEP_CLOCKS = 1250.0
BITS_STEP_CLOCKS = 950.0
# More of a step, for each token of the tile.
TOKEN_STEP_CLOCKS = 2.5
# More of a tile, for each of its tokens.
TOKEN_TILE_CLOCKS = 8.0
LAYOUT = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


@dataclasses.dataclass(frozen=True)
class MaskedTiles:
    """Tile sizes of a product.

    tokens: of a tile, which has 128 features.
    splits: parts of the contracted axis; with more than one, results are sums in
        float32.
    """

    tokens: int
    splits: int = 1

    def __post_init__(self):
        if self.tokens not in TILE_TOKENS or self.splits < 1:
            raise ValueError(
                "MaskedTiles: tokens must be 64, 128 or 256 and splits at least 1, "
                f"got {self.tokens} and {self.splits}"
            )

    def count(self, contracted: int) -> int:
        """Steps of a block."""
        return pl.cdiv(contracted, DEPTH * self.splits)

    def slots(self, mask_bytes: float, sums: bool) -> tuple[int, int]:
        """Steps in flight, of tokens and of weights: no more than 4, as many as fit.

        sums: whether there are sums over lanes.
        """
        out = COMPUTE * PIECE * PIECE * (2 if self.splits == 1 else 4)
        free = SMEM_BYTES - RESERVED_BYTES - out
        if sums:
            free -= LANE_SUMS_BYTES
        tokens = 2 * DEPTH * self.tokens
        weights = int(FEATURES * DEPTH * (2 + mask_bytes))
        both = min(4, free // (tokens + weights))
        # Weights are read a step ahead.
        return both, min(4, (free - both * tokens) // weights)

    def clocks(
        self, samples: int, seq: int, contracted: int, features: int, mask_bytes: float
    ) -> float:
        """The clocks that a product with these tiles takes on an H200, about.

        Tiles take turns on the multiprocessors, and all together no less than every
        array takes to and from memory. Parts are written and read in float32, from L2.
        """
        blocks = samples * pl.cdiv(seq, self.tokens) * pl.cdiv(features, FEATURES)
        turns = pl.cdiv(self.splits * blocks, device.multiprocessors())
        step = STEP_CLOCKS if mask_bytes >= 1 else BITS_STEP_CLOCKS
        step += TOKEN_STEP_CLOCKS * self.tokens
        tile = self.count(contracted) * step + TOKEN_TILE_CLOCKS * self.tokens
        weights = contracted * features * (2 + samples * mask_bytes)
        moved = 2 * samples * seq * (contracted + features) + weights
        moved_us = moved / h200.MEMORY_BYTES_PER_US / h200.MEMORY_SHARE
        clocks = max(turns * tile, moved_us * h200.CLOCKS_PER_US)
        if self.splits == 1:
            return clocks
        parts = 8 * self.splits * samples * seq * features
        added_us = h200.LAUNCH_US + parts / h200.L2_BYTES_PER_US
        return clocks + added_us * h200.CLOCKS_PER_US


def choose_tiles(
    samples: int, seq: int, contracted: int, features: int, mask_bytes: float
) -> MaskedTiles:
    """The tiles of the fewest clocks; of equal ones, the largest and the fewest parts.

    They depend on the shape alone, since with the parts the rounding of a result
    changes.
    """
    steps = pl.cdiv(contracted, DEPTH)
    valid = [
        MaskedTiles(tokens, splits)
        for splits in SPLITS
        if steps % splits == 0
        for tokens in TILE_TOKENS
    ]
    sizes = samples, seq, contracted, features, mask_bytes
    return min(valid, key=lambda tiles: tiles.clocks(*sizes))


def by_threshold(kind: Kind) -> bool:
    """Whether the mask is made of logits."""
    return kind not in ("mask", "bits")


def bytes_of(kind: Kind, dtype: Any) -> float:
    """Of a mask, for each number of W."""
    return 4 / WORD if kind == "bits" else float(jnp.dtype(dtype).itemsize)


def mask_buffer(kind: Kind, dtype, slots: int, rows: int, columns: int):
    if kind == "bits":
        return plgpu.SMEM((slots, rows // WORD, columns), jnp.int32)
    return buffer(dtype, slots, rows, columns)


def cut(gmem, sample, rows, columns, kind: Kind = "mask"):
    """A tile, by first and size along either axis; it may reach past the end."""
    if kind == "bits":
        rows = lax.div(rows[0], WORD), rows[1] // WORD
    return gmem.at[sample, pl.ds(rows[0], rows[1]), pl.ds(columns[0], columns[1])]


def numbers_of(kind: Kind, x):
    """What W is multiplied by, of logits or a mask, in float32."""
    x = x.astype(jnp.float32)
    if not by_threshold(kind):
        return x
    # A NaN stays one, as in `straight_through`.
    return jnp.where(x > 0, 1.0, jnp.where(x <= 0, 0.0, x))


def _unpack(words, i):
    """Bit i of 32 is that of the upper of two words, or of the lower, in float32."""
    word = jnp.where(i < WORD, *words)
    bit = lax.shift_right_logical(word, lax.bitwise_and(i, WORD - 1))
    return lax.bitwise_and(bit, 1).astype(jnp.float32)


def read_mask(kind: Kind, smem, row, column, columns: int):
    """The numbers that 64 rows of a tile of W are multiplied by, in float32."""
    index = pl.ds(column, columns)
    if kind != "bits":
        return numbers_of(
            kind, plgpu.load(smem.at[pl.ds(row, PIECE), index], layout=LAYOUT)
        )
    shape = PIECE, columns
    words = [
        plgpu.load(smem.at[lax.div(row, WORD) + n, index], layout=LAYOUT.reduce(0))
        for n in range(PIECE // WORD)
    ]
    words = [lax.broadcast_in_dim(w, shape, [1]) for w in words]
    return _unpack(words, plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=LAYOUT))


def _pack(numbers):
    """Words of 32 columns each, (rows,), in which a bit is on for a positive number.

    numbers: of the layout `TRANSPOSED`.
    """
    i = plgpu.broadcasted_iota(jnp.int32, numbers.shape, 1, layout=TRANSPOSED)
    places = lax.shift_left(jnp.int32(1), lax.bitwise_and(i, WORD - 1))
    bits = jnp.where(numbers > 0, places, 0)
    # Each bit has its own place, so that the sum is the word.
    return [
        bits[:, n : n + WORD].sum(1, dtype=jnp.int32)
        for n in range(0, numbers.shape[1], WORD)
    ]


def _masked(kind: Kind, transposed: bool, w_smem, mask_smem, first):
    """W * m of 64 features in registers, and m: float32 (features, DEPTH).

    transposed: features are the rows of W, else the columns, from `first` on.
    """
    if transposed:
        weights = plgpu.load(w_smem.at[pl.ds(first, PIECE)], layout=LAYOUT)
        numbers = read_mask(kind, mask_smem, first, 0, DEPTH)
        return weights.astype(jnp.float32) * numbers, numbers
    features = pl.ds(first, PIECE)

    def load(smem):
        view = smem.at[pl.ds(0, DEPTH), features].transpose((1, 0))
        return plgpu.load(view, layout=TRANSPOSED)

    weights = load(w_smem)
    if kind != "bits":
        numbers = numbers_of(kind, load(mask_smem))
        return weights.astype(jnp.float32) * numbers, numbers
    shape = PIECE, DEPTH
    words = [
        plgpu.load(mask_smem.at[n, features], layout=LAYOUT.reduce(1))
        for n in range(PIECE // WORD)
    ]
    words = [lax.broadcast_in_dim(w, shape, [0]) for w in words]
    i = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT)
    weights = plgpu.layout_cast(weights, LAYOUT).astype(jnp.float32)
    numbers = _unpack(words, i)
    return weights * numbers, numbers


def _keep(gmem, numbers, first, sample, row, column):
    """As bits, if `first`: what 64 rows of W, in columns, are multiplied by."""
    exists = (row < gmem.shape[1] * WORD) & (column < gmem.shape[2])

    @pl.when(first & exists)
    def write_words():
        for n, words in enumerate(_pack(numbers)):
            gmem[sample, lax.div(row, WORD) + n, pl.ds(column, PIECE)] = words


def _store(acc, smem, gmem, part, token, feature):
    """A warpgroup's features of a tile, transposed, 64 tokens after the others."""
    for n in range(0, acc.shape[1], PIECE):
        piece = acc[:, n : n + PIECE].astype(smem.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.transpose((1, 0))[...] = plgpu.layout_cast(piece, TRANSPOSED)
        plgpu.commit_smem()
        target = (token + n, PIECE), (feature, PIECE)
        plgpu.copy_smem_to_gmem(smem, cut(gmem, part, *target))


@dataclasses.dataclass(frozen=True)
class _ProductPlan:
    """What a launch computes, as the host plans it.

    transposed: contract the columns of W, not its rows.
    pack: write the mask's bits too.
    count: steps of a block.
    group: samples that share a W.
    """

    kind: Kind
    transposed: bool
    tiles: MaskedTiles
    pack: bool
    count: int
    group: int

    @property
    def name(self) -> str:
        words = ["masked_product"]
        if self.transposed:
            words.append("transposed")
        words.append("logits" if by_threshold(self.kind) else self.kind)
        if self.pack:
            words.append("and_bits")
        return "_".join(words)

    def bind(self, x_gmem, w_gmem, mask_gmem, y_gmem, *refs) -> Roles:
        """The roles of a block's warpgroups, inside the kernel."""
        words_gmem = None
        if self.pack:
            words_gmem, *refs = refs
        warpgroup = lax.axis_index("warpgroup")
        gmem = x_gmem, w_gmem, mask_gmem, y_gmem, words_gmem
        block = _ProductBlock(self, warpgroup, *gmem, *refs)
        return Roles(block.compute, block.load, block.drain)


@dataclasses.dataclass(frozen=True)
class _ProductBlock:
    """A block of the plan inside the kernel, with its references.

    A step of the W ring has a tile of W and of the mask, one of the x ring the tokens
    that this is multiplied by.
    """

    plan: _ProductPlan
    warpgroup: Any
    x_gmem: Any
    w_gmem: Any
    mask_gmem: Any
    y_gmem: Any
    words_gmem: Any
    x_smem: Any
    w_smem: Any
    mask_smem: Any
    y_smem: Any
    x_ring: Ring
    w_ring: Ring

    def compute(self, info) -> None:
        tokens = self.plan.tiles.tokens
        shape = plgpu.ACC((PIECE, tokens), jnp.float32)
        start = info.local_index * self.plan.count
        acc = pl.run_scoped(partial(self.accumulate, info, start), shape)
        part, column, row = info.index
        first = row * tokens, (column * COMPUTE + self.warpgroup) * PIECE
        _store(acc, self.y_smem.at[self.warpgroup], self.y_gmem, part, *first)

    def accumulate(self, info, start, acc):
        """The sums of this warpgroup's features, over the steps from `start` on.

        The weights of the next step are masked while the wgmma of this one runs.
        """
        count = self.plan.count

        def step(i, weights):
            following = partial(self.mask_tile, i + 1, info)
            return self.factor(self.multiply(acc, start + i, weights, following))

        weights = self.factor(self.mask_tile(jnp.int32(0), info))
        weights = lax.fori_loop(0, count - 1, step, weights)
        self.multiply(acc, start + count - 1, weights)
        return acc[...]

    def multiply(self, acc, at, weights, meanwhile=lambda: None):
        """Add the product of step `at`; what `meanwhile` makes while it runs."""
        s = self.x_ring.wait(at)
        plgpu.wgmma(acc, weights, self.x_smem.at[s].transpose((1, 0)))
        following = meanwhile()
        plgpu.wgmma_wait(0)
        self.x_ring.release(at)
        return following

    def mask_tile(self, i, info):
        """The weights of this warpgroup's features, of step `i`, in float32."""
        plan = self.plan
        at = info.local_index * plan.count + i
        s = self.w_ring.wait(at)
        # Without this barrier the compiler keeps the addresses of the slots in
        # registers.
        first = lax.optimization_barrier(self.warpgroup) * PIECE
        smem = self.w_smem.at[s], self.mask_smem.at[s]
        tile, numbers = _masked(plan.kind, plan.transposed, *smem, first)
        if plan.pack:
            # In the block of the first tokens.
            first = info.index[2] == 0
            _keep(self.words_gmem, numbers, first, *self.where_of(i, info))
        # TMA may write what has been read here.
        plgpu.commit_smem()
        self.w_ring.release(at)
        return tile

    def where_of(self, i, info):
        """The sample, and the row and column of W that this warpgroup's tile has."""
        splits = self.plan.tiles.splits
        part, column, _ = info.index
        row = (lax.rem(part, splits) * self.plan.count + i) * DEPTH
        sample = lax.div(part, splits)
        return sample, row, (column * COMPUTE + self.warpgroup) * PIECE

    def factor(self, masked):
        """As wgmma takes it: not before the last one is done, or all would wait."""
        return plgpu.layout_cast(masked.astype(self.x_smem.dtype), LAYOUT)

    def load(self, info) -> None:
        plan, (part, column, row) = self.plan, info.index
        splits, tokens = plan.tiles.splits, plan.tiles.tokens
        sample = lax.div(part, splits)
        begin = lax.rem(part, splits) * plan.count

        @pl.loop(0, plan.count)
        def load_step(i):
            at = info.local_index * plan.count + i
            along = (begin + i) * DEPTH, DEPTH
            across = column * FEATURES, FEATURES
            where = (across, along) if plan.transposed else (along, across)
            weights = cut(self.w_gmem, lax.div(sample, plan.group), *where)
            masks = cut(self.mask_gmem, sample, *where, plan.kind)
            self.w_ring.fill(at, (weights, self.w_smem), (masks, self.mask_smem))
            x = cut(self.x_gmem, sample, (row * tokens, tokens), along)
            self.x_ring.fill(at, (x, self.x_smem))

    def drain(self, tiles) -> None:
        self.x_ring.drain(tiles * self.plan.count)
        self.w_ring.drain(tiles * self.plan.count)


def product_kernel(
    kind: Kind,
    *,
    transposed: bool = False,
    pack: bool = False,
    tiles: MaskedTiles | None = None,
):
    """The kernel of (x, w, mask), or of (dy, w, mask) if transposed.

    pack: its results are the product and the bits of the mask that is made of logits,
        else the product alone.
    """
    return over_heads(partial(_multiply_masked, kind, transposed, pack, tiles))


def _multiply_masked(
    kind: Kind, transposed: bool, pack: bool, tiles: MaskedTiles | None, x, w, mask
) -> tuple[jax.Array, ...]:
    """x_b (W_b * m_b), or with W * m transposed; and the mask's words if `pack`.

    x: (samples, seq, contracted).
    w: (groups, rows, columns), each of as many samples.
    mask: (samples, rows, columns), or their bits, (samples, rows / 32, columns).
    """
    if pack and (transposed or not by_threshold(kind)):
        raise ValueError(f"no bits of {kind}, transposed: {transposed}")
    samples, seq, contracted = x.shape
    features = w.shape[1 if transposed else 2]
    mask_bytes = bytes_of(kind, mask.dtype)
    tiles = tiles or choose_tiles(samples, seq, contracted, features, mask_bytes)
    group = samples // w.shape[0]
    plan = _ProductPlan(kind, transposed, tiles, pack, tiles.count(contracted), group)
    x_slots, w_slots = tiles.slots(mask_bytes, sums=pack)
    shape = (FEATURES, DEPTH) if transposed else (DEPTH, FEATURES)
    dtype = x.dtype if tiles.splits == 1 else jnp.float32
    buffers = [
        buffer(x.dtype, x_slots, tiles.tokens, DEPTH),
        buffer(w.dtype, w_slots, *shape),
        mask_buffer(kind, mask.dtype, w_slots, *shape),
        buffer(dtype, COMPUTE, PIECE, PIECE),
    ]
    parts = samples * tiles.splits
    grid = parts, pl.cdiv(features, FEATURES), pl.cdiv(seq, tiles.tokens)
    outs = [jax.ShapeDtypeStruct((parts, seq, features), dtype)]
    if pack:
        words = samples, contracted // WORD, features
        outs.append(jax.ShapeDtypeStruct(words, jnp.int32))
    rings = Slots(x_slots, 1), Slots(w_slots, 2)
    y, *bits = launch(
        plan.name,
        plan.bind,
        grid=grid,
        outs=outs,
        buffers=buffers,
        rings=rings,
        operands=(x, w, mask),
    )
    if tiles.splits > 1:
        y = y.reshape(samples, tiles.splits, seq, features)
        y = y.sum(1).astype(x.dtype)
    return y, *bits
