"""The kernel of products with masked weights: y_b = x_b (W * m_b), or its transpose.

A block computes the transpose of up to 256 tokens x 128 features of a sample's result.
The masked weights of a warpgroup's 64 features are the left factor of its wgmma, which
can lie in registers, so nothing masked is ever stored. With 256 tokens and float32
logits, and 64 numbers of the contracted axis a step:

    warpgroup 2  --TMA-->  W ring, 3 slots of 48 KiB:   filled: 2 loads (W, mask)
                 --TMA-->  x ring, 2 slots of 32 KiB:   filled: 1 load (tokens)
    warpgroup w  wait x filled[i], issue 4 wgmma m64n256k16 of step i
      (0 or 1)   meanwhile wait W filled[i + 1], make W * m, arrive W emptied[i + 1]
                 await the wgmmas, arrive x emptied[i]

    tensor cores             | (W * m)[0] x[0]^T | (W * m)[1] x[1]^T | ...
    CUDA cores   (W * m)[0]  |    (W * m)[1]     |    (W * m)[2]     | ...

At the end each warpgroup stores its sums, 64 tokens at a time, through a buffer of its
own. The two wait for each other only through the slots that both must empty.

Why these tiles: a thread has 64 x 256 / 128 = 128 sums, and 32 numbers each of W and of
the mask. A weight is masked once for all tokens of a tile, so many tokens are better,
if tiles suffice for all multiprocessors. With 16 samples of 256 tokens, 512 x 2048 and
float32 logits, an H200 took 26.9 us with 256 tokens and 31.0 with 128; for the
transposed product, which has a quarter of the tiles, 37.3 and 32.3
(`benchmarks/results/nvidia_h200/launches.json`, rows `product b16 256/1 N logits
float32` and the like). `MaskedTiles.clocks` models this. Where there are still fewer
tiles than multiprocessors, the contracted axis can be split among blocks, and XLA adds
their sums.

For a backward, the forward also writes the mask that it has made as bits, in the block
with the first tokens of a sample. These have a 32nd of the bytes of float32 logits. The
backward reads them for the gradients of x and W, and reads the logits only for an
estimator whose slope depends on them.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..._core import device, h200
from ..._mosaic.base import SMEM_BYTES, buffer, plgpu
from ..._mosaic.batching import over_heads
from ..._mosaic.launch import COMPUTE, Ring, Roles, Slots, launch
from ..packed import WORD
from .masks import (
    LAYOUT,
    PIECE,
    TRANSPOSED,
    Kind,
    by_threshold,
    bytes_of,
    cut,
    mask_buffer,
    numbers_of,
    pack_bits,
    read_mask,
    unpack_bits,
)

# Features of a product's tile, of both warpgroups.
FEATURES = 128
# Numbers of the contracted axis in a step: rows of 128 bytes, the widest swizzle.
DEPTH = 64
# Tokens of a product's tile to choose from, the largest first.
TILE_TOKENS = (256, 128, 64)
# Parts of the contracted axis to choose from.
SPLITS = (1, 2, 4, 8)
# Bytes of shared memory kept for barriers.
RESERVED_BYTES = 512
# Bytes of shared memory that JAX adds where a kernel sums over lanes.
LANE_SUMS_BYTES = 2048
# Clocks of a step with logits or numbers, fitted to launches on an H200
# (`launches.json`, rows `product`). Steps wait for shared memory, not for the tensor
# cores.
STEP_CLOCKS = 1250.0
# Clocks of a step with bits, fitted to the same launches.
BITS_STEP_CLOCKS = 950.0
# Clocks that each token of the tile adds to a step, fitted to the same.
TOKEN_STEP_CLOCKS = 2.5
# Clocks that each token of the tile adds to the tile, fitted to the same.
TOKEN_TILE_CLOCKS = 8.0


@dataclasses.dataclass(frozen=True)
class MaskedTiles:
    """Tile sizes of a product.

    tokens: tokens of a tile, which has 128 features.
    splits: parts of the contracted axis. With more than one, the kernel's results are
        partial sums in float32.
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
        """Steps of a tile."""
        return pl.cdiv(contracted, DEPTH * self.splits)

    def slots(self, mask_bytes: float, sums: bool) -> tuple[int, int]:
        """Slots of the x ring and of the W ring: as many as fit, at most 4 of each.

        mask_bytes: bytes of the mask for each number of W.
        sums: whether the kernel sums over lanes, as it does to pack bits.
        """
        out = COMPUTE * PIECE * PIECE * (2 if self.splits == 1 else 4)
        free = SMEM_BYTES - RESERVED_BYTES - out
        if sums:
            free -= LANE_SUMS_BYTES
        tokens = 2 * DEPTH * self.tokens
        weights = int(FEATURES * DEPTH * (2 + mask_bytes))
        both = min(4, free // (tokens + weights))
        # Weights get what is left, since they are read a step ahead of tokens.
        return both, min(4, (free - both * tokens) // weights)

    def clocks(
        self, samples: int, seq: int, contracted: int, features: int, mask_bytes: float
    ) -> float:
        """Predict the clocks that a product with these tiles takes on an H200.

        Tiles take turns on the multiprocessors, and all of them take at least as long
        as every array takes to and from memory. The parts of a split product are
        written and read in float32 from L2, by one launch more.
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
    """Return the tiles with the fewest predicted clocks.

    Of equal ones, those with the fewest parts and then the largest are chosen. The
    choice depends on the shape alone, since the number of parts changes how a result is
    rounded.
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


def _masked(kind: Kind, transposed: bool, w_smem, mask_smem, first):
    """Return W * m of 64 features, and m, both float32 (64, DEPTH) in registers.

    transposed: whether the features are rows of W; else they are columns.
    first: the first feature in the tile.
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
    numbers = unpack_bits(words, i)
    return weights * numbers, numbers


def _keep(gmem, numbers, first, sample, row, column):
    """Write the mask as bits if `first`, where `row` and `column` exist.

    numbers: what 64 rows of W from `row` on are multiplied by, transposed: its rows are
        the columns of W from `column` on.
    """
    exists = (row < gmem.shape[1] * WORD) & (column < gmem.shape[2])

    @pl.when(first & exists)
    def write_words():
        for n, words in enumerate(pack_bits(numbers)):
            gmem[sample, lax.div(row, WORD) + n, pl.ds(column, PIECE)] = words


def _store(acc, smem, gmem, part, token, feature):
    """Transpose and store a warpgroup's (features, tokens), 64 tokens at a time."""
    for n in range(0, acc.shape[1], PIECE):
        piece = acc[:, n : n + PIECE].astype(smem.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.transpose((1, 0))[...] = plgpu.layout_cast(piece, TRANSPOSED)
        plgpu.commit_smem()
        target = (token + n, PIECE), (feature, PIECE)
        plgpu.copy_smem_to_gmem(smem, cut(gmem, part, *target))


@dataclasses.dataclass(frozen=True)
class _ProductPlan:
    """A launch, as the host plans it.

    transposed: whether the columns of W are contracted, not its rows.
    pack: whether the mask's bits are a result too.
    count: steps of a tile.
    group: how many samples share a W.
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
        """The functions of a block's warpgroups, inside the kernel."""
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

    A slot of the W ring has a tile of W and of the mask. A slot of the x ring has the
    tokens that they are multiplied by.
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
        """Return the sums of this warpgroup's features, over the steps from `start` on.

        The weights of the next step are masked while the wgmmas of this one run.
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
        """Add the product of step `at`; return what `meanwhile` makes while it runs."""
        s = self.x_ring.wait(at)
        plgpu.wgmma(acc, weights, self.x_smem.at[s].transpose((1, 0)))
        following = meanwhile()
        plgpu.wgmma_wait(0)
        self.x_ring.release(at)
        return following

    def mask_tile(self, i, info):
        """Return the masked weights of this warpgroup's features in step `i`."""
        plan = self.plan
        at = info.local_index * plan.count + i
        s = self.w_ring.wait(at)
        # Without this barrier the compiler keeps the addresses of all slots in
        # registers.
        first = lax.optimization_barrier(self.warpgroup) * PIECE
        smem = self.w_smem.at[s], self.mask_smem.at[s]
        tile, numbers = _masked(plan.kind, plan.transposed, *smem, first)
        if plan.pack:
            # All tiles of a sample's tokens make the same mask; the first one writes.
            first = info.index[2] == 0
            _keep(self.words_gmem, numbers, first, *self.where_of(i, info))
        # Threads have read W and the mask by ordinary loads. Without this fence, TMA
        # may overwrite them before.
        plgpu.commit_smem()
        self.w_ring.release(at)
        return tile

    def where_of(self, i, info):
        """Return the sample, and the row and column of W where this tile starts."""
        splits = self.plan.tiles.splits
        part, column, _ = info.index
        row = (lax.rem(part, splits) * self.plan.count + i) * DEPTH
        sample = lax.div(part, splits)
        return sample, row, (column * COMPUTE + self.warpgroup) * PIECE

    def factor(self, masked):
        """Return masked weights as wgmma takes them.

        This must follow `multiply`, which awaits its wgmmas. If input registers of a
        wgmma were defined while another is in flight, the compiler would serialize all.
        """
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
    """Return the kernel of products; it takes (x, w, mask), or (dy, w, mask).

    transposed: whether W * m is transposed, as for the gradient of x.
    pack: whether the mask's bits are a result too. The mask must be made of logits.
    tiles: tile sizes; by default `choose_tiles` chooses them.
    """
    return over_heads(partial(_multiply_masked, kind, transposed, pack, tiles))


def _multiply_masked(
    kind: Kind, transposed: bool, pack: bool, tiles: MaskedTiles | None, x, w, mask
) -> tuple[jax.Array, ...]:
    """Return x_b (W_b * m_b), or x_b (W_b * m_b)^T, and the mask's words if `pack`.

    x: (samples, seq, contracted).
    w: (groups, rows, columns). Each W is for as many samples.
    mask: (samples, rows, columns), or bits, (samples, rows / 32, columns).
    """
    if pack and (transposed or not by_threshold(kind)):
        raise ValueError(
            "masked_product: to pack bits, masks must be made of logits and transposed "
            f"must be False, got {kind} and {transposed}"
        )
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
