"""The Hopper kernels of attention, in an emulator that detects races.

Tracing and compiling take most of a run of both passes, whatever the size. So each run
here checks several independent things.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import (
    assert_attention,
    assert_largest_error,
    attention_args,
    attention_float64,
    check_attention,
    plain_attention,
    seen_args,
)
from helpers import assert_as_close, mesh, value_and_vjp, with_vjp

from jaxkern import BlockMask, block_sparse_attention
from jaxkern._attention.hopper.attend import _enlarged, _positive, attend
from jaxkern._attention.hopper.kernels import config_of, forward
from jaxkern._attention.tiles import cotangents_of
from jaxkern._core import device
from jaxkern._mosaic.launch import WalkTiles
from jaxkern.testing.compiler import lower

BF16, F16 = jnp.bfloat16, jnp.float16


def check(size, mask, dtype=BF16, scale=None):
    """Assert that the kernel is as exact as the plain form."""

    def op(query, key, value):
        options: Any = {"mask": mask, "scale": scale, "return_lse": True}
        return block_sparse_attention(
            query, key, value, implementation="mosaic_gpu", **options
        )

    return check_attention(op, size, mask.to_dense(), dtype, scale)


def some_blocks(seed, heads, rows, columns):
    """Draw half of the blocks; one row and one column of the first head have none."""
    blocks = np.random.default_rng(seed).random((heads, rows, columns)) < 0.5
    blocks[0, -1] = blocks[0, :, 0] = False
    return blocks


def in_blocks(seed, n, fn=None):
    count = -(-n // 128)
    blocks = some_blocks(seed, 2, count, count)
    return BlockMask.from_blocks(blocks, seq_q=n, seq_kv=n, mask_fn=fn)


def every_third(b, h, q, k):
    return (q + k + h) % 3 != 0


MASKS = {
    "causal": lambda n: BlockMask.causal(n, n),
    "no mask": lambda n: BlockMask.local_window(n, n, window=n),
    "window": lambda n: BlockMask.local_window(n, n, window=40),
    "global and local": lambda n: BlockMask.global_local(
        n, n, global_tokens=3, window=20
    ),
    "dilated or strided": lambda n: (
        BlockMask.dilated(n, n, rates=(2,)) | BlockMask.strided(n, n, stride=2)
    ),
    "blocks": lambda n: in_blocks(0, n),
    "causal in blocks": lambda n: in_blocks(1, n) & BlockMask.causal(n, n),
    "a function in blocks": lambda n: in_blocks(2, n, every_third),
    "a function": lambda n: BlockMask.from_mask_fn(every_third, n, n, heads=2),
    "dense": lambda n: BlockMask.from_dense(
        np.random.default_rng(3).random((2, n, n)) < 0.4
    ),
    "documents": lambda n: (
        BlockMask.document(np.arange(n) // 50) & BlockMask.causal(n, n)
    ),
}


# Each kind of predicate decides some pairs of a query and a key alone.
IDS = np.stack([np.arange(200) // 50, np.arange(200) // 90])
TOGETHER = {
    "bands and diagonals": lambda: (
        MASKS["global and local"](200) | MASKS["dilated or strided"](200)
    ),
    "functions in blocks": lambda: (
        MASKS["causal in blocks"](200) | MASKS["a function in blocks"](200)
    ),
    "bits and documents": lambda: (
        (MASKS["dense"](200) | BlockMask.document(IDS)) & BlockMask.causal(200, 200)
    ),
}
# The dims are on both sides of the largest one that needs two launches, and not three.
DIMS = {
    "bands and diagonals": 32,
    "functions in blocks": 128,
    "bits and documents": 192,
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", TOGETHER)
def test_masks(name):
    dim, batch = DIMS[name], 2 if "documents" in name else 1
    check((batch, 200, 200, 2, 1, dim, dim), TOGETHER[name]())


def whole(size, block_size):
    return BlockMask.local_window(*size[1:3], window=999, block_size=block_size)


def causal(size, block_size):
    return BlockMask.causal(*size[1:3], block_size=block_size)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "size, block_size, mask, dtype, scale",
    [
        # Rows of keys, and of queries, have more tiles than the ring has slots.
        ((2, 70, 200, 4, 2, 24, 40), 64, whole, F16, None),
        ((1, 290, 150, 1, 1, 48, 48), 256, causal, BF16, None),
        ((1, 100, 300, 2, 1, 80, 40), 192, whole, BF16, None),
        ((1, 1, 7, 3, 3, 1, 1), 128, causal, F16, -0.5),
        ((1, 130, 70, 1, 1, 256, 256), 64, causal, BF16, None),
    ],
)
def test_sizes(size, block_size, mask, dtype, scale):
    check(size, mask(size, block_size), dtype, scale)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_the_kernels_scale_is_positive(scale):
    query = attention_args((1, 4, 4, 2, 1, 8, 8))[0][0]
    scaled, factor = _positive(query, scale)
    assert factor > 0
    np.testing.assert_array_equal(scaled * factor, query * scale)


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 65504.0])
def test_float16_cotangents_are_enlarged_exactly(size):
    """Gradients of logits come near the largest float16; `delta` fits what is rounded.

    The cotangent is float32, as in a ring of dilated attention.
    """
    digits = np.random.default_rng(0).uniform(0.5, 1, (1, 3, 2, 256))
    value, lse = jnp.full(digits.shape, 65504, F16), jnp.zeros((1, 3, 2))
    of_ring = jnp.asarray(size * digits, jnp.float32), lse, jnp.dtype(F16)
    d_out, delta = cotangents_of(value.astype(jnp.float32), lse, *of_ring)
    got, of_row, inverse = _enlarged(value, d_out, delta.mT)
    assert np.frexp(inverse)[0] == 0.5
    got, want = (np.asarray(x, np.float64) for x in (got, d_out))
    np.testing.assert_array_equal(got * np.asarray(inverse, np.float64), want)
    np.testing.assert_allclose(delta, (want * 65504).sum(-1), rtol=1e-6)
    largest = (got * 65504).sum(-1).max() + np.asarray(of_row).max()
    assert 2**13 < largest < 2**15


def test_a_batch_with_a_nan_or_an_infinity_is_not_enlarged():
    d_out = jnp.full((3, 3, 2, 16), 1e-3, F16)
    d_out = d_out.at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf)
    delta = jnp.zeros((3, 2, 3))
    got, _, inverse = _enlarged(jnp.ones_like(d_out), d_out, delta)
    np.testing.assert_array_equal(got[:2], d_out[:2])
    assert inverse[0] == inverse[1] == 1 > inverse[2]


@pytest.mark.usefixtures("hopper")
def test_known_and_traced_masks_give_the_same_under_vmap():
    """`vmap` repeats the batches of a mask; one of its two inputs has large logits.

    The backward's weights are exp(logit - lse), with the error of a rounded lse.
    """
    ids = np.stack([np.arange(140) // 50, np.arange(140) // 90])
    mask = BlockMask.document(ids) & BlockMask.causal(140, 140)
    size, scale = (2, 140, 140, 2, 1, 16, 16), 0.25
    visible = np.asarray(mask.to_dense()).repeat(2, 1)
    plain = with_vjp(partial(plain_attention, visible=visible, scale=scale))
    inputs = [seen_args(size, visible, BF16), attention_args(size, BF16, spread=30)]
    args, cotangents = jax.tree.map(lambda *x: jnp.stack(x), *inputs)

    def several(mask, args, cotangents):
        run = jax.vmap(partial(attend, mask=mask, scale=scale))
        return value_and_vjp(run, args, cotangents)

    known = jax.jit(partial(several, mask))(args, cotangents)
    traced = jax.jit(several)(mask, args, cotangents)
    for a, b in zip(*map(jax.tree.leaves, (known, traced)), strict=True):
        np.testing.assert_array_equal(a, b)
    small, large = (jax.tree.map(lambda x, i=i: x[i], known) for i in range(2))
    exact = [attention_float64(*of, visible, scale) for of in inputs]
    assert_attention(small, exact[0], plain(*inputs[0]))
    bound = plain(*inputs[1])
    assert_as_close(large[0], bound[0], exact[1][0])
    assert_largest_error(large[1], bound[1], exact[1][1])


@pytest.mark.usefixtures("hopper")
def test_under_vmap_a_function_may_ask_for_the_batch():
    mask = BlockMask.from_mask_fn(lambda b, h, q, k: k <= q + b, 70, 70, batch=2)
    size, visible = (2, 70, 70, 2, 1, 16, 16), np.asarray(mask.to_dense()).repeat(2, 1)
    args, cotangents = attention_args(size, BF16)
    queries = jnp.stack([args[0], -args[0]])
    in_axes = 0, None, None

    def several(*args):
        run = partial(attend, mask=mask, scale=0.25)
        return jax.vmap(run, in_axes)(*args)

    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), cotangents)
    (out, lse), (d_query, _, _) = value_and_vjp(several, (queries, *args[1:]), stacked)
    plain = with_vjp(partial(plain_attention, visible=visible, scale=0.25))
    for i, query in enumerate(queries):
        of_one = query, *args[1:]
        bound, exact = (
            (x[0], x[1][0])
            for x in (
                plain(of_one, cotangents),
                attention_float64(of_one, cotangents, visible, 0.25),
            )
        )
        assert_as_close(((out[i], lse[i]), d_query[i]), bound, exact)


@pytest.mark.newest
def test_under_vmap_a_mask_of_all_batches_stays_one():
    """The kernels are those of one larger batch."""
    mask = BlockMask.causal(70, 70)
    args, _ = attention_args((4, 70, 70, 2, 1, 16, 16), BF16)
    stacked = [x.reshape(2, 2, *x.shape[1:]) for x in args]
    run = partial(attend, mask=mask, scale=0.25)
    assert lower(jax.vmap(run), tuple(stacked)) == lower(run, args)


@pytest.mark.usefixtures("hopper")
def test_under_shard_map():
    # The emulator has one device at a time.
    devices = mesh(data=1, model=1)
    blocks = np.stack([some_blocks(seed, 2, 2, 2) for seed in (0, 1)])
    mask = BlockMask.from_blocks(blocks, seq_q=140, seq_kv=140)
    spec, specs = jax.P("data", None, "model"), mask.partition_specs("data", "model")

    def kernel(*args):
        def local(mask, *args):
            return attend(*args, mask=mask, scale=0.25)

        sharded = jax.shard_map(
            local,
            mesh=devices,
            in_specs=(specs, spec, spec, spec),
            out_specs=(spec, spec),
        )
        return sharded(mask, *args)

    check_attention(kernel, (2, 140, 140, 2, 2, 16, 16), mask.to_dense(), BF16)


SMALL, LARGE = (2, 1, 7, 2, 1, 8, 8), (1, 1001, 333, 6, 2, 72, 72)


@pytest.mark.parametrize(
    "size, mask",
    [(SMALL, "causal"), (LARGE, "documents"), (LARGE, "dense")],
    ids=["small", "documents", "dense"],
)
def test_any_size_lowers_for_a_gpu(size, mask):
    """Lowering checks more than the emulator does."""
    args, cotangents = attention_args(size, BF16)
    seq_q, seq_kv = size[1:3]
    lists = {
        "causal": lambda: BlockMask.causal(seq_q, seq_kv, block_size=64),
        "documents": lambda: BlockMask.document(np.arange(seq_q) // 9),
        "dense": lambda: BlockMask.from_dense(np.tri(seq_q, seq_kv) % 2 == 1),
    }[mask]()
    if mask == "documents":
        args = args[0], *(a[:, :1].repeat(seq_q, 1) for a in args[1:])

    def gradients(args, cotangents):
        def kernel(*args):
            return attend(*args, mask=lists, scale=0.1)

        return jax.vjp(kernel, *args)[1](cotangents)

    assert len(lower(gradients, (args, cotangents))) == 3


def test_under_remat():
    """Programs are only lowered: the emulator's callbacks cannot be checkpointed."""
    args, _ = attention_args((1, 64, 64, 1, 1, 16, 16), BF16)
    mask = BlockMask.causal(64, 64)

    def loss(*args):
        out, _ = attend(*args, mask=mask, scale=0.25)
        return out.astype(jnp.float32).sum()

    def kernels(fn):
        return len(lower(jax.value_and_grad(fn, argnums=(0, 1, 2)), args))

    assert kernels(loss) == 3
    assert kernels(jax.checkpoint(loss)) == 4


@pytest.mark.usefixtures("chooses_hopper")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": jnp.float32}, "dtype must be bfloat16 or float16 .*, got float32"),
        ({"dim": 264}, "dim and dim_v must be at most 256 .*, got 264 and 264"),
        ({"dim_v": 264}, "dim and dim_v must be at most 256 .*, got 16 and 264"),
        ({"block_size": 32}, "block_size must be a multiple of 64 .*, got 32"),
        (
            {"fn": lambda b, h, q, k: jnp.sort(q + 0 * k, axis=-1) > 0},
            "mask_fn must be elementwise arithmetic of b, h, q and k .*, got sort",
        ),
        (
            {"fn": lambda b, h, q, k: jnp.asarray(np.arange(70))[q] >= k},
            r"mask_fn must be elementwise .*, got one that holds an array of .*\(70,\)",
        ),
    ],
)
def test_refusals(options, message):
    dtype, dim = options.get("dtype", BF16), options.get("dim", 16)
    size = 1, 70, 70, 2, 1, dim, options.get("dim_v", dim)
    args, _ = attention_args(size, dtype)
    mask = BlockMask.causal(70, 70, block_size=options.get("block_size", 128))
    if "fn" in options:
        mask &= BlockMask.from_mask_fn(options["fn"], 70, 70)
    call: Any = {"mask": mask}
    with pytest.raises(NotImplementedError, match=f"block_sparse_attention: {message}"):
        block_sparse_attention(*args, implementation="mosaic_gpu", **call)
    assert not lower(lambda *args: block_sparse_attention(*args, **call), args)


@pytest.mark.parametrize(
    "version, refused", [(0, False), (12080, True), (12090, True), (12091, False)]
)
def test_cuda_that_miscompiles_masks_is_refused(version, refused, monkeypatch):
    class Versions:
        def cuda_runtime_get_version(self):
            return version

    monkeypatch.setattr(device, "cuda_versions", Versions())
    reason = device.miscompiled()
    assert (reason is not None) == refused
    assert reason is None or "from 12.9.1 on" in reason


def test_config_that_does_not_fit_says_what_it_needs():
    args, _ = attention_args((1, 128, 128, 1, 1, 256, 256), BF16)
    mask = BlockMask.causal(128, 128)
    with pytest.raises(ValueError, match="attention_forward: .* must fit 232448 bytes"):
        forward(*args, mask=mask, scale=0.1, exact=False, config=WalkTiles(64, 128))


def test_configs_fit_for_every_dim():
    for dim in range(16, 257, 16):
        for kernel in ("forward", "backward_q", "backward_kv"):
            for block_size in (64, 128, 192, 256):
                config = config_of(kernel, dim, block_size)
                assert block_size % config.columns == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, dim",
    [(name, 64) for name in MASKS] + [("causal", d) for d in (32, 80, 128, 192, 256)],
)
def test_masks_on_gpu(name, dim):
    check((2, 1000, 1000, 2, 1, dim, dim), MASKS[name](1000))


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_blocks_on_gpu(block_size, dtype):
    n = 1000
    count = -(-n // block_size)
    blocks = some_blocks(5, 4, count, count)
    mask = BlockMask.from_blocks(blocks, block_size=block_size, seq_q=n, seq_kv=n)
    check((2, n, n, 4, 2, 64, 64), mask, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("seq", [4096, 32768])
def test_long_sequences_on_gpu(seq):
    """The first and last rows are right, and a second run gives the same bits."""
    args, cotangents = attention_args((1, seq, seq, 2, 1, 128, 128), BF16)
    mask = BlockMask.causal(seq, seq)

    def kernel(*args):
        return attend(*args, mask=mask, scale=128**-0.5)

    first, second = (value_and_vjp(kernel, args, cotangents) for _ in range(2))
    for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(np.asarray(a, np.float32)).all()
    query, key, value = args
    (out, lse), _ = first
    for rows in (slice(0, 64), slice(seq - 64, seq)):
        visible = np.tri(seq, seq, dtype=bool)[rows][None, None].repeat(2, 1)
        want, want_lse = plain_attention(
            *(x.astype(jnp.float32) for x in (query[:, rows], key, value)),
            visible=visible,
            scale=128**-0.5,
        )
        np.testing.assert_allclose(lse[:, rows], want_lse, atol=1e-4)
        error = np.abs(np.asarray(out[:, rows], np.float32) - want).max()
        assert error <= 0.01 * np.abs(want).max()
