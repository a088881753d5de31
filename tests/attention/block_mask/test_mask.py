import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_mask_definitions import assert_is, positions, states_listed, states_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxkern import BlockMask

IDS_ON_DEVICE = jnp.arange(40) // 9
CAUSAL_ON_DEVICE = jnp.tri(40, dtype=bool)


def test_masks_can_be_built_under_jit():
    @jax.jit
    def build(x):
        masks = (
            BlockMask.causal(40, 40, block_size=16),
            BlockMask.from_mask_fn(lambda b, h, q, k: q == k, 40, 40, block_size=16),
            BlockMask.document(IDS_ON_DEVICE, block_size=16),
            BlockMask.from_dense(CAUSAL_ON_DEVICE, block_size=16),
        )
        assert all(isinstance(m.density, float) for m in masks)
        return x, masks

    q, k = positions((40, 40))
    expected = k <= q, q == k, q // 9 == k // 9, k <= q
    for mask, dense in zip(build(1.0)[1], expected, strict=True):
        assert_is(mask, dense)


dense_masks = st.builds(
    lambda seed, share, leading, size: (
        np.random.default_rng(seed).random((*leading, *size)) < share
    ),
    st.integers(0, 100),
    st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
    st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]),
    st.just((20, 13)),
)
block_sizes = st.sampled_from([1, 4, 5, 32])


@settings(max_examples=8)
@given(dense_masks, dense_masks, block_sizes)
def test_and_or_of_dense(a, b, block_size):
    masks = [BlockMask.from_dense(x, block_size=block_size) for x in (a, b)]
    assert_is(masks[0] & masks[1], a & b, exact_lists=False)
    assert_is(masks[0] | masks[1], a | b, exact_lists=False)
    states = [states_of(x, block_size) for x in (a, b)]
    for mask, op in [
        (masks[0] & masks[1], np.minimum),
        (masks[0] | masks[1], np.maximum),
    ]:
        np.testing.assert_array_equal(states_listed(mask), op(*states))


PATTERNS = {
    "causal": lambda n, m: BlockMask.causal(n, m, block_size=8),
    "window": lambda n, m: BlockMask.local_window(n, m, window=9, block_size=8),
    "global": lambda n, m: BlockMask.global_local(
        n, m, global_tokens=3, window=4, block_size=8
    ),
    "dilated": lambda n, m: BlockMask.dilated(n, m, rates=[2], block_size=8),
    "strided": lambda n, m: BlockMask.strided(n, m, stride=2, block_size=8),
    "empty": lambda n, m: BlockMask.from_dense(np.zeros((n, m), bool), block_size=8),
    "heads": lambda n, m: BlockMask.from_mask_fn(
        lambda b, h, q, k: (q + k) % (h + 1) == 0, n, m, heads=2, block_size=8
    ),
    "blocks": lambda n, m: BlockMask.from_blocks(
        np.random.default_rng(0).random((-(-n // 8), -(-m // 8))) < 0.5,
        block_size=8,
        seq_q=n,
        seq_kv=m,
        mask_fn=lambda b, h, q, k: q != k,
    ),
}
names = st.sampled_from(sorted(PATTERNS))


@settings(max_examples=8)
@given(names, names, names, st.sampled_from([(30, 30), (17, 40), (24, 16)]))
def test_and_or_of_patterns(a, b, c, lengths):
    masks = [PATTERNS[name](*lengths) for name in (a, b, c)]
    dense = [np.asarray(mask.to_dense()) for mask in masks]
    mask = (masks[0] & masks[1]) | masks[2]
    assert_is(mask, (dense[0] & dense[1]) | dense[2], exact_lists=False)


@pytest.mark.parametrize(
    "names", [("causal", "heads", "blocks"), ("empty", "global", "dilated")]
)
def test_and_or_under_jit(names):
    masks = [PATTERNS[name](17, 40) for name in names]
    mask = (masks[0] & masks[1]) | masks[2]
    traced = jax.jit(lambda a, b, c: (a & b) | c)(*masks)
    np.testing.assert_array_equal(states_listed(traced), states_listed(mask))
    np.testing.assert_array_equal(traced.to_dense(), mask.to_dense())


def test_a_mask_is_a_pytree():
    n = 64
    mask = BlockMask.document(np.arange(n) // 20, block_size=16)
    mask &= BlockMask.causal(n, n, block_size=16)
    leaves, tree = jax.tree.flatten(mask)
    assert_is(jax.tree.unflatten(tree, leaves), mask.to_dense())
    assert_is(jax.device_put(mask), mask.to_dense())
    assert all(leaf.shape[:2] == (1, 1) for leaf in leaves)
    np.testing.assert_array_equal(
        jax.jit(lambda m: m.to_dense())(mask), mask.to_dense()
    )
    assert "BlockMask(seq_q=64" in repr(jax.tree.map(lambda x: None, mask))


def test_equal_patterns_share_one_compiled_program():
    density: Any = jax.jit(lambda mask: mask.density)

    def build(window):
        n = 100
        local = BlockMask.local_window(n, n, window=30, block_size=16)
        ids = BlockMask.document(np.arange(n) // window, block_size=16)
        return BlockMask.causal(n, n, block_size=16) & local & ids

    for window in (100, 100, 101):
        assert density(build(window)) == pytest.approx(build(window).density)
    assert density._cache_size() == 1


@pytest.mark.parametrize(
    "build, most_bytes",
    [
        (lambda n: BlockMask.causal(n, n), 2**19),
        (
            lambda n: (
                BlockMask.causal(n, n) & BlockMask.local_window(n, n, window=4096)
            ),
            2**20,
        ),
        (lambda n: BlockMask.global_local(n, n, global_tokens=512, window=4096), 2**23),
        (lambda n: BlockMask.dilated(n, n, rates=[1, 2, 4]), 2**20),
        (lambda n: BlockMask.document(np.arange(n, dtype=np.int32) // 999), 2**23),
    ],
    ids=["causal", "causal-window", "global", "dilated", "document"],
)
def test_a_million_tokens(build, most_bytes):
    start = time.perf_counter()
    mask = build(2**20)
    # It takes 0.03 to 0.2 s on an idle machine.
    assert time.perf_counter() - start < 5
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(mask)) <= most_bytes


def test_flex_attention_names():
    mask = BlockMask.causal(100, 70, block_size=16)
    assert mask.kv_num_blocks.shape == mask.full_kv_num_blocks.shape == (1, 1, 7)
    assert mask.kv_indices.shape == mask.full_kv_indices.shape == (1, 1, 7, 5)
    assert mask.q_num_blocks.shape == mask.full_q_num_blocks.shape == (1, 1, 5)
    assert mask.q_indices.shape == mask.full_q_indices.shape == (1, 1, 5, 7)
    np.testing.assert_array_equal(mask.full_kv_num_blocks[0, 0], [0, 1, 2, 3, 4, 4, 0])
    np.testing.assert_array_equal(mask.full_kv_indices[0, 0, 3], [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(mask.full_q_indices[0, 0, 1], [2, 3, 4, 5, 0, 0, 0])


def test_partition_specs():
    blocks = np.ones((2, 3, 4, 4), bool)
    specs = jax.tree.leaves(
        BlockMask.from_blocks(blocks).partition_specs("data", "model")
    )
    assert set(specs) == {P("data", "model")}
    ids = BlockMask.document(np.zeros((2, 512), np.int32))
    assert set(jax.tree.leaves(ids.partition_specs("data", "model"))) == {
        P("data", None)
    }
    assert set(jax.tree.leaves(ids.partition_specs())) == {P(None, None)}
