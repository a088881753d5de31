from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import (
    assert_attention,
    assert_close,
    attention_args,
    attention_float64,
    plain_attention,
)
from helpers import DTYPES, assert_near, mesh, untyped, value_and_vjp
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import BlockMask, block_sparse_attention


def attend(query, key, value, mask, scale=None) -> Any:
    return block_sparse_attention(
        query, key, value, mask=mask, scale=scale, return_lse=True
    )


def make_args(
    mask, dtype: Any = jnp.float32, *, batch=2, heads=4, kv_heads=2, dim=8, dim_v=8
) -> Any:
    size = batch, *mask.shape[2:], heads, kv_heads, dim, dim_v
    return attention_args(size, dtype)


def assert_is_dense_attention(mask, args, cotangents, scale=None):
    got = value_and_vjp(partial(attend, mask=mask, scale=scale), args, cotangents)
    scale = args[0].shape[-1] ** -0.5 if scale is None else scale
    shape = args[0].shape[0], args[0].shape[2], *mask.shape[2:]
    dense = np.broadcast_to(mask.to_dense(), shape)
    assert_attention(got, attention_float64(args, cotangents, dense, scale))


def random_blocks(seed, *shape, share=0.4):
    return np.random.default_rng(seed).random(shape) < share


def some_pairs(b, h, q, k):
    return (q + 2 * k + h + b) % 3 != 0


def random_mask(*leading):
    """Return a mask with full, partial and empty blocks and empty rows in all heads."""
    blocks = random_blocks(0, *leading, 5, 4)
    blocks[..., 2, :] = False
    sizes: Any = {"block_size": 16, "seq_q": 77, "seq_kv": 61}
    other = random_blocks(1, *leading, 5, 4, share=0.3)
    other[..., 2, :] = False
    return BlockMask.from_blocks(blocks, **sizes) | BlockMask.from_blocks(
        other, **sizes, mask_fn=some_pairs
    )


MASKS = {
    "shared": lambda: random_mask(),
    "heads": lambda: random_mask(4),
    "batch and heads": lambda: random_mask(2, 4),
    "causal, wide": lambda: BlockMask.causal(33, 100, block_size=16),
    "causal, tall": lambda: BlockMask.causal(100, 33, block_size=16),
    "global": lambda: BlockMask.global_local(
        90, 90, global_tokens=10, window=5, block_size=16
    ),
    "tokens": lambda: BlockMask.from_dense(
        np.random.default_rng(3).random((2, 4, 60, 50)) < 0.03, block_size=16
    ),
    "documents": lambda: (
        BlockMask.document(np.arange(140).reshape(2, 70) ** 2 // 900, block_size=16)
        & BlockMask.causal(70, 70, block_size=16)
    ),
    "empty": lambda: BlockMask.from_blocks(np.zeros((2, 3), bool), block_size=16),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@masks
def test_is_dense_attention(mask):
    mask = mask()
    assert_is_dense_attention(mask, *make_args(mask))


@pytest.mark.parametrize("leading", [(), (4,)], ids=["shared", "heads"])
def test_one_key_head_other_value_dim_and_scale(leading):
    mask = random_mask(*leading)
    args, cotangents = make_args(mask, kv_heads=1, dim=7, dim_v=5)
    assert_is_dense_attention(mask, args, cotangents, scale=0.7)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 100),
    block_size=st.sampled_from([1, 3, 8, 64]),
    seq_q=st.sampled_from([1, 7, 24]),
    seq_kv=st.sampled_from([1, 16, 23]),
    leading=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]),
    share=st.sampled_from([0.05, 0.5, 0.9]),
)
def test_any_mask_is_dense_attention(seed, block_size, seq_q, seq_kv, leading, share):
    dense = np.random.default_rng(seed).random((*leading, seq_q, seq_kv)) < share
    mask = BlockMask.from_dense(dense, block_size=block_size)
    args, cotangents = make_args(mask, heads=2, kv_heads=1, dim=4, dim_v=4)
    assert_is_dense_attention(mask, args, cotangents)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_error_is_that_of_the_plain_form(dtype):
    diagonal = BlockMask.local_window(77, 61, window=20, block_size=16)
    mask = random_mask(4) | diagonal
    args, cotangents = make_args(mask, dtype, dim=32, dim_v=32)
    dense = jnp.broadcast_to(mask.to_dense(), (2, 4, 77, 61))
    got = value_and_vjp(partial(attend, mask=mask), args, cotangents)
    plain = partial(plain_attention, visible=dense, scale=32**-0.5)
    assert got[0][1].dtype == jnp.float32
    assert_attention(
        got,
        attention_float64(args, cotangents, np.asarray(dense), 32**-0.5),
        value_and_vjp(plain, args, cotangents),
    )


def test_empty_rows_have_no_gradient_even_of_an_infinite_loss():
    mask = random_mask(4)
    args, (d_out, d_lse) = make_args(mask)
    seen = np.asarray(mask.to_dense()).any(-1).swapaxes(1, 2)
    assert not seen[:, 32:48].any()
    d_lse = jnp.where(seen, d_lse, jnp.nan)
    got = value_and_vjp(partial(attend, mask=mask), args, (d_out, d_lse))
    finite = d_out, jnp.where(seen, d_lse, 0)
    dense = np.broadcast_to(mask.to_dense(), (2, 4, 77, 61))
    assert_attention(got, attention_float64(args, finite, dense, 8**-0.5))


def test_keys_that_no_block_has_are_never_read():
    blocks = random_blocks(0, 4, 5, 5)
    blocks[:, :, 3] = False
    blocks[:, 1] = False
    mask = BlockMask.from_blocks(blocks, block_size=16)
    (query, key, value), cotangents = make_args(mask)
    unseen = slice(48, 64)
    args = query, key.at[:, unseen].set(jnp.nan), value.at[:, unseen].set(jnp.nan)
    got = value_and_vjp(partial(attend, mask=mask), args, cotangents)
    (out, _), gradients = got
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    assert (gradients[1][:, unseen] == 0).all()


def test_large_logits():
    magnitude, mask = 1e4, random_mask(4)
    (query, key, value), cotangents = make_args(mask)
    args = magnitude * query, key, value
    got = value_and_vjp(partial(attend, mask=mask), args, cotangents)
    assert all(np.isfinite(x).all() for x in (got[0][0], *got[1]))
    dense = np.broadcast_to(mask.to_dense(), (2, 4, 77, 61))
    exact = attention_float64(args, cotangents, dense, 8**-0.5)
    assert_attention(got, exact)


def lowered(mask, both_passes):
    def forward(args, mask):
        return attend(*args, mask=mask)

    def backward(args, mask):
        value, vjp = jax.vjp(lambda *args: attend(*args, mask=mask), *args)
        return vjp(value)

    args, _ = make_args(mask, batch=1, heads=2, kv_heads=2, dim=16, dim_v=16)
    fn = backward if both_passes else forward
    return args, jax.jit(fn).lower(args, mask).compile()


@pytest.mark.parametrize("both_passes", [False, True], ids=["forward", "backward"])
def test_memory_is_that_of_arguments_and_one_tile(both_passes):
    for n in (2048, 4096):
        mask = BlockMask.causal(n, n) & BlockMask.local_window(n, n, window=256)
        args, compiled = lowered(mask, both_passes)
        memory: Any = compiled.memory_analysis()
        tiles = 16 * 2 * 128 * 128 * 4
        # 2048 squared in float32 would be 16 MiB a head.
        assert memory.temp_size_in_bytes <= 10 * args[0].nbytes + tiles


def test_every_block_is_visited_once():
    """The predicate is called once for each partial block, and not for full ones."""
    visits = []

    def fn(b, h, q, k):
        jax.debug.callback(
            lambda *at: visits.append(tuple(map(int, at))), h, q[0, 0], k[0, 0]
        )
        return k <= q

    blocks = random_blocks(0, 2, 4, 4)
    mask = BlockMask.from_blocks(blocks, block_size=8, mask_fn=fn)
    (query, key, value), _ = make_args(mask, heads=2)
    jax.block_until_ready(block_sparse_attention(query, key, value, mask=mask))
    jax.effects_barrier()
    assert len(visits) == blocks.sum()
    expected = {(h, 8 * i, 8 * j) for h, i, j in np.argwhere(blocks)}
    assert set(visits) == expected


def loss(args, mask):
    out, lse = attend(*args, mask=mask)
    return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()


value_and_grads = jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", ["heads", "documents"])
def test_the_mask_is_an_argument_or_a_constant_of_jit(name):
    mask = MASKS[name]()
    args, _ = make_args(mask)
    expected = value_and_grads(args, mask)
    closed_over = jax.jit(jax.value_and_grad(lambda args: loss(args, mask)))
    assert_near(closed_over(args), expected)
    assert_near(value_and_grads(args, jax.device_put(mask)), expected)


def test_blocks_chosen_under_jit_compile_once():
    @jax.jit
    def run(args, scores):
        mask = BlockMask.from_blocks(scores > 0.6, block_size=16, seq_q=77, seq_kv=61)
        return jax.value_and_grad(loss)(args, mask)

    @jax.jit
    def plain(args, visible):
        def plain_loss(args):
            out, lse = plain_attention(*args, visible=visible, scale=8**-0.5)
            return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

        return jax.value_and_grad(plain_loss)(args)

    for seed in range(3):
        scores = np.random.default_rng(seed).random((4, 5, 4))
        mask = BlockMask.from_blocks(scores > 0.6, block_size=16, seq_q=77, seq_kv=61)
        args, _ = make_args(mask)
        assert_near(run(args, scores), plain(args, np.asarray(mask.to_dense())))
    traced: Any = run
    assert traced._cache_size() == 1


def test_vmap():
    mask = random_mask(4)
    args, _ = make_args(mask)
    many = jax.tree.map(lambda x: jnp.stack([x, x[::-1], -x]), args)
    expected = [
        value_and_grads(jax.tree.map(lambda x, i=i: x[i], many), mask) for i in range(3)
    ]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    assert_near(jax.vmap(value_and_grads, (0, None))(many, mask), expected)


def test_vmap_over_masks():
    blocks = random_blocks(0, 3, 4, 5, 4)

    @jax.jit
    def run(blocks, args):
        return jax.value_and_grad(loss)(
            args, BlockMask.from_blocks(blocks, block_size=16)
        )

    args, _ = make_args(BlockMask.from_blocks(blocks[0], block_size=16))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *[run(x, args) for x in blocks])
    assert_near(jax.jit(jax.vmap(run, (0, None)))(blocks, args), expected)


def test_remat_and_scan():
    mask = random_mask(4)
    args, _ = make_args(mask, kv_heads=4)

    def layer(x, mask):
        query = x[:, :77]
        out, _ = attend(query, x[:, :61], x[:, :61], mask)
        return x.at[:, :77].add(out)

    def loops(x, mask):
        return (layer(layer(x, mask), mask) ** 2).sum()

    def scans(x, mask):
        step = jax.checkpoint(lambda x, _: (layer(x, mask), None))
        return (jax.lax.scan(step, x, None, length=2)[0] ** 2).sum()

    x = args[0]
    got, expected = (jax.jit(jax.value_and_grad(f))(x, mask) for f in (scans, loops))
    assert_near(got, expected)


@pytest.mark.parametrize(
    "name, kv_heads",
    [("shared", 4), ("batch and heads", 8)],
)
def test_shard_map_over_batch_and_heads(name, kv_heads):
    leading = {"shared": (), "batch and heads": (2, 8)}
    blocks = random_blocks(0, *leading[name], 5, 4)
    mask = BlockMask.from_blocks(blocks, block_size=16, seq_q=77, seq_kv=61)
    mask |= BlockMask.local_window(77, 61, window=9, block_size=16)
    args, _ = make_args(mask, heads=8, kv_heads=kv_heads)
    tensors = P("data", None, "model")
    sharded = jax.shard_map(
        attend,
        mesh=mesh(data=2, model=4),
        in_specs=(tensors, tensors, tensors, mask.partition_specs("data", "model")),
        out_specs=tensors,
    )

    def sharded_loss(args, mask):
        query, key, value = args
        out, lse = sharded(query, key, value, mask)
        return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    got = jax.jit(jax.value_and_grad(sharded_loss))(args, mask)
    assert_near(got, value_and_grads(args, mask))


def test_shard_map_with_whole_keys():
    """Queries are split by the batch; every device has all keys and values."""
    mask = BlockMask.local_window(40, 40, window=9, block_size=16)
    (query, key, value), _ = make_args(mask, batch=8)
    key, value = key[:1], value[:1]

    def local(query, key, value):
        return attend(query, key, value, mask)[0]

    sharded = jax.shard_map(
        local,
        mesh=mesh(data=2, model=4),
        in_specs=(P(("data", "model")), P(), P()),
        out_specs=P(("data", "model")),
    )

    def one_device(query, key, value):
        key, value = (jnp.broadcast_to(x, (8, *x.shape[1:])) for x in (key, value))
        return local(query, key, value)

    got, expected = (
        jax.jit(jax.grad(lambda args, f=f: (f(*args) ** 2).sum()))((query, key, value))
        for f in (sharded, one_device)
    )
    assert_near(got, expected)


@pytest.mark.parametrize(
    "leading, kind",
    [((4,), "auto"), ((2, 1), "auto")],
    ids=["heads", "batch"],
)
def test_sharded_arguments(leading, kind):
    mask = random_mask(*leading)
    args, cotangents = make_args(mask, kv_heads=4)
    expected = value_and_vjp(partial(attend, mask=mask), args, cotangents)
    place = NamedSharding(mesh(kind, data=2, model=4), P("data", None, "model"))
    args, cotangents = jax.device_put((args, cotangents), place)
    got = value_and_vjp(partial(attend, mask=mask), args, cotangents)
    assert_attention(got, expected)


@pytest.mark.parametrize("name", ["shared", "heads"])
def test_jacobian(name):
    leading = {"shared": (), "heads": (2,)}[name]
    blocks = random_blocks(0, *leading, 3, 3, share=0.7)
    mask = BlockMask.from_blocks(blocks, block_size=4, seq_q=9, seq_kv=10)
    mask |= BlockMask.local_window(9, 10, window=2, block_size=4)
    args, _ = make_args(mask, batch=1, heads=2, kv_heads=1, dim=3, dim_v=2)
    visible = np.broadcast_to(mask.to_dense(), (1, 2, 9, 10))
    plain = partial(plain_attention, visible=visible, scale=0.5)
    run = partial(attend, mask=mask, scale=0.5)
    every = [jax.jit(jax.jacrev(f, argnums=(0, 1, 2)))(*args) for f in (run, plain)]
    assert_close(*every)


MASK = BlockMask.causal(40, 40, block_size=16)
Q = jnp.ones((2, 40, 4, 8))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "mask, options, error, message",
    [
        (
            np.ones((40, 40), bool),
            {},
            TypeError,
            "block_sparse_attention: mask must be a BlockMask, such as "
            r"BlockMask.causal.* or BlockMask.from_dense\(mask\), got bool",
        ),
        (None, {}, TypeError, "mask must be a BlockMask, .* got NoneType"),
        (
            BlockMask.causal(40, 41),
            {},
            ValueError,
            r"mask must have the lengths of query and key, \(40, 40\), got \(40, 41\)",
        ),
        (
            BlockMask.from_blocks(np.ones((3, 1, 1, 1), bool), seq_q=40, seq_kv=40),
            {},
            ValueError,
            "block_sparse_attention: batch of mask must be 1 or 2, got 3",
        ),
        (
            BlockMask.from_blocks(np.ones((2, 1, 1), bool), seq_q=40, seq_kv=40),
            {},
            ValueError,
            "block_sparse_attention: heads of mask must be 1 or 4, got 2",
        ),
        (MASK, {"value": Q[:, :39]}, ValueError, "value must have shape"),
        (MASK, {"key": Q.astype(jnp.bfloat16)}, TypeError, "key must have the dtype"),
        (MASK, {"key": Q[:, :, :3], "value": Q[:, :, :3]}, ValueError, "heads of"),
        (MASK, {"implementation": "cuda"}, ValueError, "implementation must be one of"),
        (
            MASK,
            {"implementation": "mosaic_gpu"},
            NotImplementedError,
            "block_sparse_attention: mosaic_gpu needs an H100 or H200, but",
        ),
    ],
)
def test_refusals(mask, options, error, message):
    tensors = {name: options.pop(name, Q) for name in ("key", "value")}
    with pytest.raises(error, match=message):
        untyped.block_sparse_attention(Q, **tensors, mask=mask, **options)
