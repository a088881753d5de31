"""Which pair of tokens attends.

A predicate `mask_fn(b, h, q, k)` takes the integers b and h and arrays of positions, q
(rows, 1) and k (1, columns), or in a kernel both (rows, columns), and tells for every
pair of tokens whether q attends to k. It is a pytree: its leaves are data, such as
segment ids, and begin with (batch or 1, heads or 1). It is right for every pair, not
only in partial blocks, so that `&` and `|` of two predicates are those of the masks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from ..._core.trees import register
from .runs import FULL, PARTIAL, AnyArray, Leaf

MaskFn = Callable[[Any, Any, Any, Any], Any]


def _static() -> Any:
    return field(metadata={"static": True})


def _of_head(leaf: AnyArray, b: Any, h: Any) -> jax.Array:
    batch, heads = leaf.shape[:2]
    return jnp.asarray(leaf)[b if batch > 1 else 0, h if heads > 1 else 0]


@register
@dataclass(frozen=True)
class Band:
    """`lower <= k - q <= upper`, where None is no bound."""

    lower: int | None = _static()
    upper: int | None = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        inside = jnp.ones((), bool)
        if self.lower is not None:
            inside &= k - q >= self.lower
        if self.upper is not None:
            inside &= k - q <= self.upper
        return inside


@register
@dataclass(frozen=True)
class Global:
    """The first tokens see all and are seen by all."""

    tokens: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q < self.tokens) | (k < self.tokens)


@register
@dataclass(frozen=True)
class Diagonals:
    """`|q_block - k_block|` is one of the distances."""

    distances: tuple[int, ...] = _static()
    block_size: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        distance = abs(q // self.block_size - k // self.block_size)
        return reduce(or_, [distance == d for d in self.distances])


@register
@dataclass(frozen=True)
class Strided:
    """`q_block - k_block` is a multiple of the stride."""

    stride: int = _static()
    block_size: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q // self.block_size - k // self.block_size) % self.stride == 0


@register
@dataclass(frozen=True, eq=False)
class Segments:
    """Both tokens have the same id; ids (batch or 1, 1, seq)."""

    ids: Leaf

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        ids = _of_head(self.ids, b, h)
        return ids[q] == ids[k]


@register
@dataclass(frozen=True, eq=False)
class Keys:
    """The key is one of those; `seen` (batch or 1, heads or 1, seq_kv), boolean."""

    seen: Leaf

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return _of_head(self.seen, b, h)[k]


@register
@dataclass(frozen=True, eq=False)
class Blocks:
    """What `states` (batch or 1, heads or 1, q_blocks, kv_blocks) says of each block.

    In its partial blocks `mask_fn` decides.
    """

    states: Leaf
    mask_fn: Any
    block_size: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        states = _of_head(self.states, b, h)
        state = states[q // self.block_size, k // self.block_size]
        if self.mask_fn is None:
            return state == FULL
        return (state == FULL) | ((state == PARTIAL) & self.mask_fn(b, h, q, k))


@register
@dataclass(frozen=True, eq=False)
class Tiles:
    """A stored bit for each pair of tokens; equal blocks share one tile of bits.

    tile_of: the tile of each block, (batch or 1, heads or 1, q_blocks, kv_blocks).
    bits: (1, 1, tiles, block_size, ceil(block_size / 8)), the lowest bits first.
    """

    tile_of: Leaf
    bits: Leaf
    block_size: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        size = self.block_size
        tile = _of_head(self.tile_of, b, h)[q // size, k // size]
        byte = jnp.asarray(self.bits)[0, 0][tile, q % size, k % size // 8]
        return (byte >> (k % size % 8).astype(jnp.uint8)) & 1 == 1


@register
@dataclass(frozen=True)
class Function:
    """A user's function, for as many batches and heads as it was asked about."""

    fn: MaskFn = _static()
    batch: int = _static()
    heads: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        b, h = b if self.batch > 1 else 0, h if self.heads > 1 else 0
        return self.fn(b, h, q, k)


@register
@dataclass(frozen=True)
class Both:
    first: Any
    second: Any

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return self.first(b, h, q, k) & self.second(b, h, q, k)


@register
@dataclass(frozen=True)
class Either:
    first: Any
    second: Any

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return self.first(b, h, q, k) | self.second(b, h, q, k)


def asks_for_batch(fn: Any) -> bool:
    """Whether some part of the predicate must know the batch that it was made for."""
    match fn:
        case Both(first, second) | Either(first, second):
            return asks_for_batch(first) or asks_for_batch(second)
        case Blocks(_, inner, _):
            return asks_for_batch(inner)
        case Function(_, batch, _):
            return batch > 1
        case Tiles():
            # Its bits have no batch to which another one could be added.
            return True
    return False


@partial(jax.jit, static_argnames="shape")
def dense(
    mask_fn: MaskFn, shape: tuple[int, int, int, int]
) -> Bool[Array, "batch heads seq_q seq_kv"]:
    batch, heads, *pairs = shape
    q, k = (jnp.arange(length) for length in pairs)

    def head(n):
        attends = mask_fn(n // heads, n % heads, q[:, None], k[None])
        return jnp.broadcast_to(attends, pairs)

    return lax.map(head, jnp.arange(batch * heads)).reshape(shape)
