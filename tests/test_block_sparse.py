from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    DTYPES,
    assert_as_exact,
    assert_near,
    normal,
    to_float64,
    untyped,
    value_and_vjp,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import BlockMask, block_sparse_attention


def attend(query, key, value, mask, **options) -> Any:
    return block_sparse_attention(
        query, key, value, mask=mask, return_lse=True, **options
    )


def attention_float64(query, key, value, dense, cotangents, scale=None) -> Any:
    """Output, log-sum-exp and the three gradients, by hand, with every logit."""
    groups = query.shape[2] // key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (np.repeat(x, groups, axis=2) for x in (key, value))
    logits = scale * np.einsum("bqhd,bkhd->bhqk", query, keys)
    logits = np.where(dense, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    top = np.where(np.isneginf(top), 0, top)
    total = np.exp(logits - top).sum(-1, keepdims=True)
    weights = np.exp(logits - top) / np.where(total > 0, total, 1)
    out = np.einsum("bhqk,bkhd->bqhd", weights, values)
    lse = np.log(total, out=np.full_like(total, -np.inf), where=total > 0) + top
    d_out, d_lse = cotangents
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_out, values)
    delta = (d_out * out).sum(-1) - d_lse
    d_logits = weights * (d_weights - delta.transpose(0, 2, 1)[..., None]) * scale
    d_query = np.einsum("bhqk,bkhd->bqhd", d_logits, keys)
    d_key = np.einsum("bhqk,bqhd->bkhd", d_logits, query)
    d_value = np.einsum("bhqk,bqhd->bkhd", weights, d_out)
    d_key, d_value = (
        x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3)
        for x in (d_key, d_value)
    )
    return (out, lse[..., 0].transpose(0, 2, 1)), (d_query, d_key, d_value)


def plain(query, key, value, dense) -> Any:
    """What one would write: matmuls in the dtype, softmax in float32."""
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32) * scale
    logits = jnp.where(dense, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, -1).astype(value.dtype)
    lse = jax.nn.logsumexp(logits, -1).swapaxes(1, 2)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value), lse


def make_args(mask, dtype=jnp.float32, batch=2, heads=4, kv_heads=2, dim=8, dim_v=8):
    _, _, q_len, kv_len = mask.shape
    args = (
        normal(0, (batch, q_len, heads, dim), dtype),
        normal(1, (batch, kv_len, kv_heads, dim), dtype),
        normal(2, (batch, kv_len, kv_heads, dim_v), dtype),
    )
    cotangents = (
        normal(3, (batch, q_len, heads, dim_v), dtype),
        normal(4, (batch, q_len, heads)),
    )
    return args, cotangents


def visible(lse):
    """A number to compare in place of the -inf of an empty row, which must agree."""
    return np.where(np.isneginf(lse), 12345.0, lse)


def assert_is_dense_attention(mask, args, cotangents, **options):
    fn = lambda *args: attend(*args, mask, **options)  # noqa: E731
    (out, lse), gradients = value_and_vjp(fn, args, cotangents)
    dense = np.asarray(mask.to_dense())
    (exact_out, exact_lse), exact_gradients = attention_float64(
        *to_float64(args), dense, to_float64(cotangents), **options
    )
    assert_near((out, *gradients), (exact_out, *exact_gradients))
    assert_near(visible(lse), visible(exact_lse))


def random_blocks(seed, *shape, share=0.4):
    return np.random.default_rng(seed).random(shape) < share


def some_pairs(b, h, q, k):
    return (q + 2 * k + h + b) % 3 != 0


def random_mask(*leading):
    """Full, partial, empty blocks and, in every head, a row that is empty."""
    blocks = random_blocks(0, *leading, 5, 4)
    blocks[..., 2, :] = False
    sizes: dict[str, int] = {"block_size": 16, "q_len": 77, "kv_len": 61}
    other = random_blocks(1, *leading, 5, 4, share=0.3)
    other[..., 2, :] = False
    return BlockMask.from_blocks(blocks, **sizes) | BlockMask.from_blocks(
        other, **sizes, mask_fn=some_pairs
    )


MASKS = {
    "shared": lambda: random_mask(),
    "heads": lambda: random_mask(4),
    "batch": lambda: random_mask(2, 1),
    "batch and heads": lambda: random_mask(2, 4),
    "causal": lambda: BlockMask.causal(70, 70, block_size=16),
    "causal, wide": lambda: BlockMask.causal(33, 100, block_size=16),
    "causal, tall": lambda: BlockMask.causal(100, 33, block_size=16),
    "window": lambda: BlockMask.local_window(100, 100, window=20, block_size=32),
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
    "one token": lambda: BlockMask.causal(1, 1),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@masks
def test_is_dense_attention(mask):
    mask = mask()
    assert_is_dense_attention(mask, *make_args(mask))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("leading", [(), (4,)], ids=["shared", "heads"])
def test_fewer_key_heads_other_value_dim_and_scale(kv_heads, leading):
    mask = random_mask(*leading)
    args, cotangents = make_args(mask, kv_heads=kv_heads, dim=7, dim_v=5)
    assert_is_dense_attention(mask, args, cotangents, scale=0.7)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 100),
    block_size=st.sampled_from([1, 3, 8, 64]),
    q_len=st.sampled_from([1, 7, 24]),
    kv_len=st.sampled_from([1, 16, 23]),
    leading=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]),
    share=st.sampled_from([0.05, 0.5, 0.9]),
)
def test_any_mask_is_dense_attention(seed, block_size, q_len, kv_len, leading, share):
    dense = np.random.default_rng(seed).random((*leading, q_len, kv_len)) < share
    mask = BlockMask.from_dense(dense, block_size=block_size)
    args, cotangents = make_args(mask, heads=2, kv_heads=1, dim=4, dim_v=4)
    assert_is_dense_attention(mask, args, cotangents)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (4,)], ids=["shared", "heads"])
def test_error_is_that_of_the_plain_form(dtype, leading):
    diagonal = BlockMask.local_window(77, 61, window=20, block_size=16)
    mask = random_mask(*leading) | diagonal
    args, cotangents = make_args(mask, dtype, kv_heads=4, dim=32, dim_v=32)
    dense = mask.to_dense()
    got = value_and_vjp(lambda *args: attend(*args, mask), args, cotangents)
    expected = value_and_vjp(lambda *args: plain(*args, dense), args, cotangents)
    exact = attention_float64(
        *to_float64(args), np.asarray(dense), to_float64(cotangents)
    )
    assert got[0][1].dtype == jnp.float32
    assert_as_exact(got, expected, exact)


def test_empty_rows_give_zero_minus_infinity_and_no_gradient():
    mask = random_mask(4)
    args, cotangents = make_args(mask)
    # As from a loss that takes the log-sum-exp of a row that has none.
    cotangents = cotangents[0], jnp.full_like(cotangents[1], jnp.nan).at[:, :32].set(1)
    (out, lse), gradients = value_and_vjp(
        lambda *args: attend(*args, mask), args, cotangents
    )
    empty = ~np.asarray(mask.to_dense()).any(-1)[0].T
    assert empty[32:48].all()
    assert (np.asarray(out)[:, empty] == 0).all()
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(empty, lse.shape))
    cotangents = cotangents[0], cotangents[1].at[:, 32:48].set(0)
    only_empty = jax.tree.map(
        lambda x: x.at[:, :32].set(0).at[:, 48:].set(0), cotangents
    )
    _, gradients = value_and_vjp(
        lambda *args: attend(*args, mask),
        args,
        (
            only_empty[0],
            jnp.full_like(lse, jnp.nan).at[:, :32].set(0).at[:, 48:].set(0),
        ),
    )
    for gradient in gradients:
        assert (np.asarray(gradient) == 0).all()


def test_keys_that_no_block_has_are_never_read():
    blocks = random_blocks(0, 4, 5, 5)
    blocks[:, :, 3] = False
    blocks[:, 1] = False
    mask = BlockMask.from_blocks(blocks, block_size=16)
    (query, key, value), cotangents = make_args(mask)
    unseen = slice(48, 64)
    args = query, key.at[:, unseen].set(jnp.nan), value.at[:, unseen].set(jnp.nan)
    got = value_and_vjp(lambda *args: attend(*args, mask), args, cotangents)
    (out, _), gradients = got
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    assert (gradients[1][:, unseen] == 0).all()


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_large_logits(magnitude):
    mask = random_mask(4)
    (query, key, value), cotangents = make_args(mask)
    args = magnitude * query, key, value
    (out, lse), gradients = value_and_vjp(
        lambda *args: attend(*args, mask), args, cotangents
    )
    exact, _ = attention_float64(
        *to_float64(args), np.asarray(mask.to_dense()), to_float64(cotangents)
    )
    assert all(np.isfinite(x).all() for x in gradients)
    assert_near((out, visible(lse)), (exact[0], visible(exact[1])), 1e-6 * magnitude)


def lowered(mask, both_passes):
    def forward(args, mask):
        return attend(*args, mask)

    def backward(args, mask):
        value, vjp = jax.vjp(lambda *args: attend(*args, mask), *args)
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
    """One call of the predicate for each partial block, none for full ones."""
    visits = []

    def fn(b, h, q, k):
        jax.debug.callback(
            lambda *at: visits.append(tuple(map(int, at))), h, q[0, 0], k[0]
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
    out, lse = attend(*args, mask)
    return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()


value_and_grads = jax.jit(jax.value_and_grad(loss))


@masks
def test_the_mask_is_an_argument_or_a_constant_of_jit(mask):
    mask = mask()
    args, _ = make_args(mask)
    expected = value_and_grads(args, mask)
    closed_over = jax.jit(jax.value_and_grad(lambda args: loss(args, mask)))
    assert_near(closed_over(args), expected)
    assert_near(value_and_grads(args, jax.device_put(mask)), expected)


def test_blocks_chosen_under_jit_compile_once():
    @jax.jit
    def run(args, scores):
        mask = BlockMask.from_blocks(scores > 0.6, block_size=16, q_len=77, kv_len=61)
        return jax.value_and_grad(loss)(args, mask)

    for seed in range(3):
        scores = np.random.default_rng(seed).random((4, 5, 4))
        mask = BlockMask.from_blocks(scores > 0.6, block_size=16, q_len=77, kv_len=61)
        args, _ = make_args(mask)
        assert_near(run(args, scores), value_and_grads(args, mask))
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
        return sum(layer(layer(x, mask), mask).ravel() ** 2)

    def scans(x, mask):
        step = jax.checkpoint(lambda x, _: (layer(x, mask), None))
        return (jax.lax.scan(step, x, None, length=2)[0] ** 2).sum()

    x = args[0]
    got, expected = (jax.jit(jax.value_and_grad(f))(x, mask) for f in (scans, loops))
    assert_near(got, expected)


def make_mesh():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)


@pytest.mark.parametrize("name", ["shared", "heads", "batch", "batch and heads"])
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_shard_map_over_batch_and_heads(name, kv_heads):
    leading = {"heads": (8,), "batch": (2, 1), "batch and heads": (2, 8), "shared": ()}
    blocks = random_blocks(0, *leading[name], 5, 4)
    mask = BlockMask.from_blocks(blocks, block_size=16, q_len=77, kv_len=61)
    mask |= BlockMask.local_window(77, 61, window=9, block_size=16)
    args, _ = make_args(mask, heads=8, kv_heads=kv_heads)
    tensors = P("data", None, "model")
    sharded = jax.shard_map(
        attend,
        mesh=make_mesh(),
        in_specs=(tensors, tensors, tensors, mask.partition_specs("data", "model")),
        out_specs=tensors,
    )

    def sharded_loss(args, mask):
        out, lse = sharded(*args, mask)
        return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    got = jax.jit(jax.value_and_grad(sharded_loss))(args, mask)
    assert_near(got, value_and_grads(args, mask))


def test_shard_map_with_whole_keys():
    """Queries are split over the batch, keys and values are everywhere the same."""
    mask = BlockMask.causal(40, 40, block_size=16)
    (query, key, value), _ = make_args(mask, batch=8)
    key, value = key[:1], value[:1]

    def local(query, key, value):
        return attend(query, key, value, mask)[0]

    sharded = jax.shard_map(
        local,
        mesh=make_mesh(),
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


@pytest.mark.parametrize("leading", [(), (4,), (2, 4)], ids=["shared", "heads", "both"])
def test_sharded_arguments(leading):
    mask = random_mask(*leading)
    args, _ = make_args(mask, kv_heads=4)
    spread = jax.device_put(args, NamedSharding(make_mesh(), P("data", None, "model")))
    assert_near(value_and_grads(spread, mask), value_and_grads(args, mask))


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
            r"BlockMask.causal.* or BlockMask.from_dense\(mask\), got ndarray",
        ),
        (None, {}, TypeError, "mask must be a BlockMask, .* got NoneType"),
        (
            BlockMask.causal(40, 41),
            {},
            ValueError,
            r"mask must have the lengths of query and key, \(40, 40\), got \(40, 41\)",
        ),
        (
            BlockMask.from_blocks(np.ones((3, 1, 1, 1), bool), q_len=40, kv_len=40),
            {},
            ValueError,
            "block_sparse_attention: batch of mask must be 1 or 2, got 3",
        ),
        (
            BlockMask.from_blocks(np.ones((2, 1, 1), bool), q_len=40, kv_len=40),
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
            "block_sparse_attention: implementation must be 'xla', got 'mosaic_gpu', "
            "for which this op has no kernel",
        ),
    ],
)
def test_refusals(mask, options, error, message):
    tensors = {name: options.pop(name, Q) for name in ("key", "value")}
    with pytest.raises(error, match=message):
        untyped.block_sparse_attention(Q, **tensors, mask=mask, **options)
