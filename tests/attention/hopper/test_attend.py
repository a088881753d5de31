"""The Hopper kernels of attention, in an emulator that detects races."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import (
    assert_as_close,
    assert_attention,
    attention_args,
    attention_float64,
    check_attention,
    plain_attention,
)
from helpers import assert_as_exact, value_and_vjp

from jaxkern import BlockMask, block_sparse_attention
from jaxkern._attention import block_sparse as _block_sparse
from jaxkern._attention.hopper import attend as _block_sparse_mgpu
from jaxkern._attention.hopper import schedule as _mgpu_schedule
from jaxkern._mosaic import base as _mgpu
from jaxkern._mosaic.launch import WalkTiles
from jaxkern.testing.compiler import lower

BF16, F16 = jnp.bfloat16, jnp.float16


@pytest.fixture(autouse=True)
def few_blocks(request, monkeypatch):
    """Each takes several tiles, one after the other."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(_mgpu_schedule, "multiprocessors", lambda: 3)


@pytest.fixture
def hopper(monkeypatch):
    """As if the default device were one."""
    monkeypatch.setattr(_block_sparse, "on_hopper", lambda: True)


def check(size, mask, dtype=BF16, fn=None):
    def kernel(query, key, value):
        scale = size[5] ** -0.5
        return _block_sparse_mgpu.attend(query, key, value, mask, scale)

    check_attention(fn or kernel, size, mask.to_dense(), dtype)


def some_blocks(seed, heads, rows, columns):
    """Half of the blocks; one row and one column of the first head have none."""
    blocks = np.random.default_rng(seed).random((heads, rows, columns)) < 0.5
    blocks[0, -1] = blocks[0, :, 0] = False
    return blocks


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
    "blocks": lambda n: BlockMask.from_blocks(
        some_blocks(0, 2, 2, 2), q_len=n, kv_len=n
    ),
    "causal in blocks": lambda n: (
        BlockMask.from_blocks(some_blocks(1, 2, 2, 2), q_len=n, kv_len=n)
        & BlockMask.causal(n, n)
    ),
    "a function in blocks": lambda n: BlockMask.from_blocks(
        some_blocks(2, 2, 2, 2), q_len=n, kv_len=n, mask_fn=every_third
    ),
    "a function": lambda n: BlockMask.from_mask_fn(every_third, n, n, heads=2),
    "dense": lambda n: BlockMask.from_dense(
        np.random.default_rng(3).random((2, n, n)) < 0.4
    ),
    "documents": lambda n: (
        BlockMask.document(np.arange(n) // 50) & BlockMask.causal(n, n)
    ),
}


# The others are in tests below and in test_attention_mgpu.
HERE = [name for name in MASKS if name not in ("causal", "no mask", "window", "blocks")]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", HERE)
def test_masks(name):
    check((1, 200, 200, 2, 1, 32, 32), MASKS[name](200))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "size, block_size, dtype",
    [
        ((1, 130, 70, 2, 2, 16, 16), 64, BF16),
        ((2, 70, 200, 4, 2, 24, 40), 64, F16),
        ((1, 290, 150, 1, 1, 48, 48), 256, BF16),
        ((1, 100, 300, 2, 1, 80, 40), 192, BF16),
        ((1, 1, 7, 3, 3, 1, 1), 128, F16),
        ((1, 130, 130, 2, 1, 128, 128), 128, BF16),
        ((1, 70, 130, 1, 1, 192, 192), 128, BF16),
        ((1, 130, 70, 1, 1, 256, 256), 64, BF16),
    ],
    ids=str,
)
def test_sizes(size, block_size, dtype):
    mask = BlockMask.causal(size[1], size[2], block_size=block_size)
    check(size, mask, dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "size, block_size", [((40, 700), 64), ((500, 40), 128)], ids=str
)
def test_rows_and_columns_longer_than_the_ring(size, block_size):
    mask = BlockMask.local_window(*size, window=999, block_size=block_size)
    check((1, *size, 1, 1, 16, 16), mask)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scale_that_is_not_positive(scale):
    mask = BlockMask.causal(70, 70)
    visible = np.asarray(mask.to_dense())
    args, cotangents = attention_args((1, 70, 70, 1, 1, 16, 16), BF16)
    kernel = partial(_block_sparse_mgpu.attend, mask=mask, scale=scale)
    plain = partial(plain_attention, visible=visible, scale=scale)
    exact = attention_float64(args, cotangents, visible, scale)
    got, bound = (value_and_vjp(fn, args, cotangents) for fn in (kernel, plain))
    assert_as_exact(got, bound, exact)


@pytest.mark.usefixtures("interpreted")
def test_masks_of_each_batch():
    ids = np.stack([np.arange(140) // 50, np.arange(140) // 90])
    check((2, 140, 140, 2, 1, 16, 16), BlockMask.document(ids))


@pytest.mark.usefixtures("interpreted")
def test_mask_computed_under_jit():
    args, cotangents = attention_args((2, 140, 140, 2, 1, 16, 16), BF16)
    ids = jnp.stack([jnp.arange(140) // 50, jnp.arange(140) // 90])

    def kernel(ids, *args):
        mask = BlockMask.document(ids)
        return _block_sparse_mgpu.attend(*args, mask=mask, scale=0.25)

    def plain(ids, *args):
        visible = (ids[:, None, :, None] == ids[:, None, None]).repeat(2, 1)
        return plain_attention(*args, visible=visible, scale=0.25)

    visible = np.asarray(BlockMask.document(ids).to_dense())
    exact = attention_float64(args, cotangents, visible.repeat(2, 1), 0.25)

    def run(fn):
        @jax.jit
        def gradients(ids):
            return value_and_vjp(lambda *args: fn(ids, *args), args, cotangents)

        return gradients(ids)

    assert_attention(run(kernel), exact, run(plain))


@pytest.mark.usefixtures("interpreted")
def test_large_logits():
    """Weights are exp(logit - lse) in the backward, no nearer than lse is rounded."""
    mask = BlockMask.causal(130, 130)
    args, cotangents = attention_args((1, 130, 130, 2, 1, 16, 16), BF16, spread=30)
    visible = np.asarray(mask.to_dense()).repeat(2, 1)

    def kernel(*args):
        return _block_sparse_mgpu.attend(*args, mask=mask, scale=0.25)

    def plain(*args):
        return plain_attention(*args, visible=visible, scale=0.25)

    exact = attention_float64(args, cotangents, visible, 0.25)
    got = value_and_vjp(kernel, args, cotangents)
    bound = value_and_vjp(plain, args, cotangents)
    assert_as_exact(got[0], bound[0], exact[0])
    assert_as_close(got[1], bound[1], exact[1])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "mask",
    [
        BlockMask.causal(70, 70),
        BlockMask.document(np.stack([np.arange(70) // 50, np.arange(70) // 20])),
        BlockMask.from_mask_fn(lambda b, h, q, k: k <= q + b, 70, 70, batch=2),
    ],
    ids=["of all", "of each batch", "a function of the batch"],
)
def test_under_vmap(mask):
    args, cotangents = attention_args((2, 70, 70, 2, 1, 16, 16), BF16)

    def gradients(query):
        def kernel(*args):
            return _block_sparse_mgpu.attend(*args, mask=mask, scale=0.25)

        return value_and_vjp(kernel, (query, *args[1:]), cotangents)

    query, alone = args[0], jax.jit(gradients)
    several = jnp.stack([query, -query])
    got = jax.vmap(gradients)(several)
    for i, one in enumerate(several):
        for a, b in zip(*map(jax.tree.leaves, (got, alone(one))), strict=True):
            np.testing.assert_array_equal(a[i], b)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("over", ["batch", "heads"])
def test_under_shard_map(over):
    # The emulator has one device at a time.
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    mask = BlockMask.from_blocks(some_blocks(0, 2, 2, 2), q_len=140, kv_len=140)
    spec = jax.P("i") if over == "batch" else jax.P(None, None, "i")
    specs = mask.partition_specs(**{over: "i"})

    def kernel(*args):
        def local(mask, *args):
            return _block_sparse_mgpu.attend(*args, mask=mask, scale=0.25)

        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(specs, spec, spec, spec), out_specs=(spec, spec)
        )
        return sharded(mask, *args)

    check((1, 140, 140, 2, 2, 16, 16), mask, fn=kernel)


@pytest.mark.parametrize(
    "size", [(2, 1, 7, 2, 1, 8, 8), (1, 1001, 333, 6, 2, 72, 72)], ids=str
)
@pytest.mark.parametrize("mask", ["causal", "documents", "dense"])
def test_any_size_lowers_for_a_gpu(size, mask):
    """Which asks for more than the emulator."""
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
            return _block_sparse_mgpu.attend(*args, mask=lists, scale=0.1)

        return jax.vjp(kernel, *args)[1](cotangents)

    assert len(lower(gradients, (args, cotangents))) == 3


def test_under_remat():
    """Lowered for a GPU: the emulator's callbacks cannot be checkpointed."""
    args, _ = attention_args((1, 64, 64, 1, 1, 16, 16), BF16)
    mask = BlockMask.causal(64, 64)

    def loss(*args):
        out, _ = _block_sparse_mgpu.attend(*args, mask=mask, scale=0.25)
        return out.astype(jnp.float32).sum()

    def kernels(fn):
        return len(lower(jax.value_and_grad(fn, argnums=(0, 1, 2)), args))

    assert kernels(loss) == 3
    assert kernels(jax.checkpoint(loss)) == 4


@pytest.mark.usefixtures("hopper")
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

    monkeypatch.setattr(_mgpu, "cuda_versions", Versions())
    reason = _mgpu.miscompiled()
    assert (reason is not None) == refused
    assert reason is None or "from 12.9.1 on" in reason


def test_config_that_does_not_fit_says_what_it_needs():
    args, _ = attention_args((1, 128, 128, 1, 1, 256, 256), BF16)
    mask = BlockMask.causal(128, 128)
    with pytest.raises(ValueError, match="attention_forward: .* must fit 232448 bytes"):
        _block_sparse_mgpu.forward(0.1, False, mask, *args, config=WalkTiles(64, 128))


def test_configs_fit_for_every_dim():
    for dim in range(16, 257, 16):
        for kernel in ("forward", "backward_q", "backward_kv"):
            for block_size in (64, 128, 192, 256):
                config = _block_sparse_mgpu.config_of(kernel, dim, block_size)
                assert block_size % config.columns == 0


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 192, 256])
def test_masks_on_gpu(mask, dim):
    check((2, 1000, 1000, 2, 1, dim, dim), _grown(mask, 1000))


def _grown(mask, n):
    """The masks of `some_blocks` have 2 x 2 of them."""
    try:
        return mask(n)
    except ValueError:
        pytest.skip("made of 2 x 2 blocks")


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_blocks_on_gpu(block_size, dtype):
    n = 1000
    count = -(-n // block_size)
    blocks = some_blocks(5, 4, count, count)
    mask = BlockMask.from_blocks(blocks, block_size=block_size, q_len=n, kv_len=n)
    check((2, n, n, 4, 2, 64, 64), mask, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("seq", [4096, 32768])
def test_long_sequences_on_gpu(seq):
    """The first and last rows, and the same twice, bit by bit."""
    args, cotangents = attention_args((1, seq, seq, 2, 1, 128, 128), BF16)
    mask = BlockMask.causal(seq, seq)

    def kernel(*args):
        return _block_sparse_mgpu.attend(*args, mask=mask, scale=128**-0.5)

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
