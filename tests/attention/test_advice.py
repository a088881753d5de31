"""The advice in attention's error messages works: these tests follow it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh, normal, untyped
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import (
    BlockMask,
    Dilation,
    attention,
    block_sparse_attention,
    context_parallel_attention,
    dilated_attention,
)

X = normal(0, (1, 12, 2, 4))
attend = partial(context_parallel_attention, axis_name="ring")


@pytest.mark.parametrize("layout, missing", [("zigzag", 2), ("striped", 2)])
def test_pad_a_causal_sequence(layout, missing):
    x = X[:, :6]
    options = {"is_causal": True, "layout": layout}
    with pytest.raises(ValueError, match=f"got 6: pad it by {missing} at the end"):
        attend(x, x, x, mesh=mesh(ring=4), **options)
    padded = jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)])
    got = attend(padded, padded, padded, mesh=mesh(ring=4), **options)
    expected = attention(x, x, x, is_causal=True)
    np.testing.assert_allclose(got[:, :6], expected, rtol=1e-5, atol=1e-6)


def test_no_padding_is_advised_where_all_queries_would_see_it():
    x = X[:, :6]
    with pytest.raises(ValueError, match="no padding helps without is_causal"):
        attend(x, x, x, mesh=mesh(ring=4))


@pytest.mark.usefixtures("unchecked_types")
def test_a_block_mask_of_a_dense_one():
    dense = np.random.default_rng(0).random((12, 12)) < 0.5
    with pytest.raises(TypeError, match=r"BlockMask.from_dense\(mask\), got bool\[12"):
        untyped.block_sparse_attention(X, X, X, mask=dense)
    got = block_sparse_attention(X, X, X, mask=BlockMask.from_dense(dense))
    expected = attention(X, X, X, mask=jnp.asarray(dense)[None, None])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_masks_of_traced_arrays():
    ids = jnp.array([0] * 5 + [1] * 7)

    def of_function(ids):
        return BlockMask.from_mask_fn(lambda b, h, q, k: ids[q] == ids[k], 12, 12)

    with pytest.raises(
        TypeError, match="BlockMask.document, of segment ids, and Block"
    ):
        jax.eval_shape(of_function, ids)
    expected = np.asarray(ids)[:, None] == np.asarray(ids)
    got = jax.jit(lambda ids: BlockMask.document(ids, block_size=4).to_dense())(ids)
    np.testing.assert_array_equal(got[0, 0], expected)
    blocks = jax.jit(lambda on: BlockMask.from_blocks(on, block_size=4).to_dense())
    on = np.tri(3, dtype=bool)
    np.testing.assert_array_equal(blocks(on)[0, 0], np.kron(on, np.ones((4, 4), bool)))


OPS = {
    "attention": lambda x: attention(x, x, x, is_causal=True),
    "dilated_attention": lambda x: dilated_attention(
        x, x, x, dilation=Dilation([12], [1]), is_causal=True
    ),
    "block_sparse_attention": lambda x: block_sparse_attention(
        x, x, x, mask=BlockMask.causal(12, 12)
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_a_sequence_that_is_split_over_an_explicit_axis(op):
    devices = mesh("explicit", ring=4)
    x = jax.device_put(X, NamedSharding(devices, P(None, "ring")))
    message = f"{op}: the tokens of .* must not .* 'ring'; context_parallel_attention"
    with pytest.raises(ValueError, match=message):
        OPS[op](x)
    got = context_parallel_attention(
        x, x, x, mesh=devices, axis_name="ring", is_causal=True, layout="striped"
    )
    np.testing.assert_allclose(got, OPS[op](X), rtol=1e-5, atol=1e-6)
