"""Masks of blocks, of a dense mask and of a function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_mask_definitions import assert_is, each_size_and, positions, sizes

from jaxkern import BlockMask

LEADING = {"shared": (), "heads": (3,), "batch and heads": (2, 3), "batch": (2, 1)}


@pytest.mark.parametrize(
    "leading, lengths",
    [(leading, (50, 47)) for leading in LEADING.values()] + [((2, 3), (64, 48))],
    ids=[*LEADING, "whole"],
)
def test_from_blocks(leading, lengths):
    blocks = np.random.default_rng(0).random((*leading, 4, 3)) < 0.5
    dense = np.kron(blocks, np.ones((16, 16), bool))[..., : lengths[0], : lengths[1]]

    def build(blocks, **options):
        seq_q, seq_kv = lengths
        return BlockMask.from_blocks(
            blocks, block_size=16, seq_q=seq_q, seq_kv=seq_kv, **options
        )

    assert_is(build(blocks), dense)
    assert_is(build(jnp.asarray(blocks)), dense)
    assert_is(jax.jit(build)(blocks), dense)

    def keep(b, h, q, k):
        return (q + k + b + h) % 3 == 0

    b, h, q, k = np.ogrid[: mask_batch(leading), : mask_heads(leading), :64, :48]
    kept = dense & keep(b, h, q, k)[..., : lengths[0], : lengths[1]]
    masks = (
        build(blocks, mask_fn=keep),
        jax.jit(lambda x: build(x, mask_fn=keep))(blocks),
    )
    for mask in masks:
        assert_is(mask, kept)


def mask_batch(leading):
    return leading[0] if len(leading) == 2 else 1


def mask_heads(leading):
    return leading[-1] if leading else 1


def test_from_blocks_fills_the_lengths():
    assert BlockMask.from_blocks(np.ones((2, 3), bool)).shape == (1, 1, 256, 384)


@each_size_and("leading", (2, 3), (), (3,), (2, 1))
def test_from_dense(size, leading):
    rng = np.random.default_rng(0)
    dense = rng.random((*leading, *size[:2])) < 0.5
    dense[..., size[2] :, :] = True
    dense[..., : size[2] // 2] = False
    mask = BlockMask.from_dense(dense, block_size=size[2])
    assert_is(mask, dense)
    assert_is(BlockMask.from_dense(jnp.asarray(dense), block_size=size[2]), dense)


def test_from_dense_keeps_equal_blocks_once():
    q, k = positions((512, 512))
    mask = BlockMask.from_dense(k <= q, block_size=64)
    stored: Any = mask.mask_fn
    assert stored.bits.shape == (1, 1, 3, 64, 8)


@sizes
def test_from_mask_fn(size):
    def fn(b, h, q, k):
        return (k <= q) & ((q + b) // 4 % (h + 2) == 0)

    mask = BlockMask.from_mask_fn(fn, *size[:2], batch=2, heads=3, block_size=size[2])
    assert_is(mask, fn(*np.ogrid[:2, :3, : size[0], : size[1]]))


def test_mask_fn_of_one_batch_is_that_of_the_first():
    mask = BlockMask.from_mask_fn(lambda b, h, q, k: q >= k + b + h, 20, 20)
    blocks = BlockMask.from_blocks(np.ones((2, 3, 1, 1), bool), seq_q=20, seq_kv=20)
    q, k = positions((20, 20))
    assert_is(mask & blocks, np.broadcast_to(k <= q, (2, 3, 20, 20)))


def test_a_mask_fn_that_ignores_its_arguments():
    mask = BlockMask.from_mask_fn(lambda b, h, q, k: k % 2 == 0, 9, 10, block_size=4)
    assert_is(mask, np.broadcast_to(np.arange(10) % 2 == 0, (9, 10)))


def test_a_mask_fn_is_given_columns_of_queries_and_rows_of_keys():
    """All calls have these shapes, so that users' functions always broadcast alike."""
    asked = set()

    def fn(b, h, q, k):
        asked.add((q.ndim, k.ndim, q.shape[1], k.shape[0]))
        return (k <= q) & (q % 3 != h)

    with jax.numpy_rank_promotion("raise"):
        mask = BlockMask.from_mask_fn(fn, 50, 41, heads=2, block_size=16)
        dense = mask.to_dense()
    assert asked == {(2, 2, 1, 1)}
    b, h, q, k = np.ogrid[:1, :2, :50, :41]
    np.testing.assert_array_equal(dense, (k <= q) & (q % 3 != h) & (b == 0))
