"""Predicates: functions that say which pairs of tokens attend.

A predicate `mask_fn(b, h, q, k)` takes the integers b and h and arrays of positions, q
of shape (rows, 1) and k of shape (1, columns), or in a kernel both of shape (rows,
columns). It says for every pair of tokens whether q attends to k. It is a pytree: its
leaves are data, such as segment ids, and begin with (batch or 1, heads or 1). It is
correct for every pair and not only in partial blocks, so that `&` and `|` of two masks
can combine their predicates.
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
    """Return the data of one batch and head."""
    batch, heads = leaf.shape[:2]
    return jnp.asarray(leaf)[b if batch > 1 else 0, h if heads > 1 else 0]


@register
@dataclass(frozen=True)
class Band:
    """Pairs with `lower <= k - q <= upper`, where None is no bound."""

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
    """Pairs with one of the first tokens, which see all and are seen by all."""

    tokens: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q < self.tokens) | (k < self.tokens)


@register
@dataclass(frozen=True)
class Diagonals:
    """Pairs whose `|q_block - k_block|` is one of the distances."""

    distances: tuple[int, ...] = _static()
    block_size: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        distance = abs(q // self.block_size - k // self.block_size)
        return reduce(or_, [distance == d for d in self.distances])


@register
@dataclass(frozen=True)
class Strided:
    """Pairs whose `q_block - k_block` is a multiple of the stride."""

    stride: int = _static()
    block_size: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q // self.block_size - k // self.block_size) % self.stride == 0


@register
@dataclass(frozen=True, eq=False)
class Segments:
    """Pairs of tokens with the same id; `ids` has the shape (batch or 1, 1, seq)."""

    ids: Leaf

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        ids = _of_head(self.ids, b, h)
        return ids[q] == ids[k]


@register
@dataclass(frozen=True, eq=False)
class Keys:
    """Pairs whose key is seen; `seen` is boolean, (batch or 1, heads or 1, seq_kv)."""

    seen: Leaf

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return _of_head(self.seen, b, h)[k]


@register
@dataclass(frozen=True, eq=False)
class Blocks:
    """Pairs of full blocks, and those of partial blocks for which `mask_fn` is True.

    `states` has the shape (batch or 1, heads or 1, q_blocks, kv_blocks).
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
    """A stored bit for each pair of tokens, where equal blocks share one tile of bits.

    Attributes:
        tile_of: The tile of each block, (batch or 1, heads or 1, q_blocks, kv_blocks).
        bits: The tiles, (1, 1, tiles, block_size, ceil(block_size / 8)), with the
            lowest bits first.
        block_size: The number of tokens in a block.
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
    """A user's function, for the batches and heads that it was asked about."""

    fn: MaskFn = _static()
    batch: int = _static()
    heads: int = _static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        b, h = b if self.batch > 1 else 0, h if self.heads > 1 else 0
        return self.fn(b, h, q, k)


@register
@dataclass(frozen=True)
class Both:
    """Pairs for which both predicates are True."""

    first: Any
    second: Any

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return self.first(b, h, q, k) & self.second(b, h, q, k)


@register
@dataclass(frozen=True)
class Either:
    """Pairs for which at least one of the predicates is True."""

    first: Any
    second: Any

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return self.first(b, h, q, k) | self.second(b, h, q, k)


def asks_for_batch(fn: Any) -> bool:
    """Say whether some part of the predicate is made for certain batches."""
    match fn:
        case Both(first, second) | Either(first, second):
            return asks_for_batch(first) or asks_for_batch(second)
        case Blocks(_, inner, _):
            return asks_for_batch(inner)
        case Function(_, batch, _):
            return batch > 1
        case Tiles():
            # Its bits have no axis of batches to which `vmap` could add one.
            return True
    return False


@partial(jax.jit, static_argnames="shape")
def dense(
    mask_fn: MaskFn, shape: tuple[int, int, int, int]
) -> Bool[Array, "batch heads seq_q seq_kv"]:
    """Ask the predicate about every pair of tokens."""
    batch, heads, *pairs = shape
    q, k = (jnp.arange(length) for length in pairs)

    def head(n):
        attends = mask_fn(n // heads, n % heads, q[:, None], k[None])
        return jnp.broadcast_to(attends, pairs)

    return lax.map(head, jnp.arange(batch * heads)).reshape(shape)
