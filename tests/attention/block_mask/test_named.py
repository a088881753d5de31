"""The named patterns: every pair of tokens, and every state of a block."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_mask_definitions import (
    assert_is,
    each_size_and,
    positions,
    sizes,
    states_listed,
    states_of,
)

from jaxkern import BlockMask
from jaxkern._attention.block_mask import patterns
from jaxkern._attention.block_mask.mask import band_mask
from jaxkern._attention.block_mask.runs import combine


@sizes
def test_causal(size):
    q, k = positions(size)
    assert_is(BlockMask.causal(*size[:2], block_size=size[2]), k <= q)


@each_size_and("window", 17, 0, 1, 15, 16, 40, 1000)
def test_local_window(size, window):
    q, k = positions(size)
    mask = BlockMask.local_window(*size[:2], window=window, block_size=size[2])
    assert_is(mask, abs(q - k) <= window)


@pytest.mark.parametrize("lengths", [(8, 8), (9, 7), (12, 9), (7, 12)])
def test_states_at_every_edge(lengths):
    """In bands and first tokens, one token decides if a block is full, or empty."""
    (seq_q, seq_kv), (q, k) = lengths, positions(lengths)
    for lower, upper in itertools.product((None, *range(-9, 3)), (None, *range(-2, 9))):
        if lower is not None and upper is not None and lower > upper:
            continue
        dense = np.ones(lengths, bool)
        if lower is not None:
            dense &= k - q >= lower
        if upper is not None:
            dense &= k - q <= upper
        got = states_listed(band_mask(lower, upper, seq_q, seq_kv, 4))[0, 0]
        np.testing.assert_array_equal(got, states_of(dense, 4))
    inside = patterns.inside(seq_q, seq_kv, 4)
    for tokens in range(14):
        first = patterns.first_tokens(tokens, seq_q, seq_kv, 4)
        got = combine(np.minimum, first, inside).to_dense()[0, 0]
        expected = states_of((q < tokens) | (k < tokens), 4)
        np.testing.assert_array_equal(got, expected)


# Users write such numbers for "no limit"; from 2**31 on they do not fit in 32 bits.
@pytest.mark.parametrize("large", [2**31 - 1, 2**31, 2**63])
def test_numbers_beyond_32_bits_are_no_limit(large):
    q, k = positions((10, 7))
    block = q // 4 - k // 4
    for made, expected in [
        (BlockMask.local_window(10, 7, window=large, block_size=4), True),
        (BlockMask.strided(10, 7, stride=large, block_size=4), block == 0),
        (BlockMask.dilated(10, 7, rates=[large, 1], block_size=4), abs(block) <= 1),
        (
            BlockMask.global_local(10, 7, global_tokens=large, window=0, block_size=4),
            True,
        ),
    ]:
        assert_is(made, np.broadcast_to(expected, (10, 7)), exact_lists=False)


def test_ids_beyond_32_bits_stay_apart():
    ids = np.array([1, 1, 2**32 + 1, 2**32 + 1, -(2**40)])
    mask = BlockMask.document(ids, block_size=2)
    assert_is(mask, ids[:, None] == ids)


@each_size_and("rates", (1, 2, 4), (), (1,), (3, 3))
def test_dilated(size, rates):
    q, k = (x // size[2] for x in positions(size))
    mask = BlockMask.dilated(*size[:2], rates=rates, block_size=size[2])
    expected = q == k
    for rate in rates:
        expected = expected | (abs(q - k) == rate)
    assert_is(mask, expected)


def test_dilated_has_the_published_densities():
    densities = [BlockMask.dilated(n, n, rates=[1]).density for n in (512, 1024)]
    assert densities == [10 / 16, 22 / 64]


@each_size_and("stride", 2, 1, 3, 100)
def test_strided(size, stride):
    q, k = (x // size[2] for x in positions(size))
    mask = BlockMask.strided(*size[:2], stride=stride, block_size=size[2])
    assert_is(mask, (q - k) % stride == 0)


@each_size_and(
    "both", (20, 20), (0, 0), (0, 20), (1, 0), (1, 20), (16, 0), (20, 0), (1000, 20)
)
def test_global_local(size, both):
    tokens, window = both
    q, k = positions(size)
    mask = BlockMask.global_local(
        *size[:2], global_tokens=tokens, window=window, block_size=size[2]
    )
    expected = (abs(q - k) <= window) | (q < tokens) | (k < tokens)
    # A block that is full only by both parts together counts as partial.
    assert_is(mask, expected, exact_lists=False)
    got = states_listed(mask) > 0
    np.testing.assert_array_equal(got[0, 0], states_of(expected, size[2]) > 0)


def test_global_tokens_of_half_a_block_are_a_column_and_a_row():
    mask = BlockMask.global_local(1024, 1024, global_tokens=64, window=0)
    states = states_listed(mask)[0, 0]
    assert (states[:, 0] == 1).all() and (states[0] == 1).all()


DOCUMENTS = {
    "ascending": np.repeat([0, 1, 2, 3], [16, 3, 40, 21]),
    "one": np.full(50, 7),
    "returning": np.repeat([0, 1, 0, 5, 1], [16, 16, 32, 5, 20]),
    "each its own": np.arange(37),
    "negative": np.repeat([-1, 4, -1], [20, 20, 20]),
    "batch": np.random.default_rng(0).integers(0, 3, (3, 60)).cumsum(1) // 16,
    "scattered": np.random.default_rng(1).integers(0, 9, (2, 70)),
}
documents = pytest.mark.parametrize("ids", DOCUMENTS.values(), ids=DOCUMENTS)
DOCUMENTS_AND_SIZES = {name: (ids, 16) for name, ids in DOCUMENTS.items()} | {
    f"{name}-{size}": (DOCUMENTS[name], size)
    for name in ("returning", "scattered")
    for size in (1, 100)
}


@pytest.mark.parametrize(
    "ids, block_size", DOCUMENTS_AND_SIZES.values(), ids=DOCUMENTS_AND_SIZES
)
def test_document(ids, block_size):
    expected = (ids[..., :, None] == ids[..., None, :])[..., None, :, :]
    expected = expected.reshape(-1, 1, *expected.shape[-2:])
    assert_is(BlockMask.document(ids, block_size=block_size), expected)
    assert_is(BlockMask.document(jnp.asarray(ids), block_size=block_size), expected)


@documents
def test_document_and_from_blocks_under_jit(ids):
    host = BlockMask.document(ids, block_size=16)
    mask = jax.jit(lambda ids: BlockMask.document(ids, block_size=16))(ids)
    assert_is(mask, host.to_dense(), exact_lists=False)
    if (np.diff(ids) >= 0).all():
        np.testing.assert_array_equal(states_listed(mask), states_listed(host))

    @jax.jit
    def causal_documents(ids):
        n = ids.shape[-1]
        mask = BlockMask.document(ids, block_size=16)
        assert str(mask) == f"BlockMask(seq_q={n}, seq_kv={n}, block_size=16)"
        both = BlockMask.causal(n, n, block_size=16) & mask
        return both, both.density

    both, density = causal_documents(ids)
    n = ids.shape[-1]
    expected = BlockMask.causal(n, n, block_size=16) & mask
    np.testing.assert_array_equal(states_listed(both), states_listed(expected))
    np.testing.assert_array_equal(both.to_dense(), expected.to_dense())
    assert float(density) == pytest.approx(expected.density)
