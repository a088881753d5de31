"""The types of the attention ops, which a type checker infers from this file."""

from typing import assert_type

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh
from jax import Array

from jaxkern import (
    BlockMask,
    Dilation,
    attention,
    block_sparse_attention,
    context_parallel_attention,
    dilated_attention,
    ring_attention,
)

Either = Array | tuple[Array, Array]
MASK = BlockMask.causal(8, 8, block_size=4)
DILATION = Dilation([4, 8], [1, 2])


def call_each(x: Array, flag: bool):
    """Each op without its lse, with it, and with a flag that is not known."""
    on = mesh(ring=2)
    assert_type(attention(x, x, x), Array)
    assert_type(attention(x, x, x, return_lse=True), tuple[Array, Array])
    yield assert_type(attention(x, x, x, return_lse=flag), Either)

    assert_type(block_sparse_attention(x, x, x, mask=MASK), Array)
    both = block_sparse_attention(x, x, x, mask=MASK, return_lse=True)
    assert_type(both, tuple[Array, Array])
    either = block_sparse_attention(x, x, x, mask=MASK, return_lse=flag)
    yield assert_type(either, Either)

    assert_type(dilated_attention(x, x, x, dilation=DILATION), Array)
    both = dilated_attention(x, x, x, dilation=DILATION, return_lse=True)
    assert_type(both, tuple[Array, Array])
    either = dilated_attention(x, x, x, dilation=DILATION, return_lse=flag)
    yield assert_type(either, Either)

    out = context_parallel_attention(x, x, x, mesh=on, axis_name="ring")
    assert_type(out, Array)
    both = context_parallel_attention(
        x, x, x, mesh=on, axis_name="ring", return_lse=True
    )
    assert_type(both, tuple[Array, Array])
    either = context_parallel_attention(
        x, x, x, mesh=on, axis_name="ring", return_lse=flag
    )
    yield assert_type(either, Either)

    @jax.shard_map(mesh=on, in_specs=jax.P(None, "ring"), out_specs=jax.P(None, "ring"))
    def ring(x):
        assert_type(ring_attention(x, x, x, axis_name="ring"), Array)
        both = ring_attention(x, x, x, axis_name="ring", return_lse=True)
        assert_type(both, tuple[Array, Array])
        either = ring_attention(x, x, x, axis_name="ring", return_lse=flag)
        return assert_type(either, Either)

    yield ring(x)


@pytest.mark.parametrize("flag", [False, True])
def test_results_are_what_their_types_say(flag):
    x = jax.ShapeDtypeStruct((1, 8, 2, 4), jnp.float32)
    for result in jax.eval_shape(lambda x: list(call_each(x, flag)), x):
        shapes = [x.shape for x in result] if flag else [result.shape]
        assert shapes == [(1, 8, 2, 4), (1, 8, 2)][: 1 + flag]
