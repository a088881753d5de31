"""One value and one gradient of each public name, and one kernel of each family.

`make test-oldest` runs this file, which finds in minutes what other versions of JAX and
flax break. Most results must only be finite and not 0; the tests of each op hold them
to bounds.
"""

import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_as_close, mesh, normal, value_and_vjp
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern import BlockMask, compress, models, nn

KEY = jax.random.key(0)
X, SQUARE = normal(0, (4, 16)), normal(1, (16, 16), scale=0.25)
PAIR = normal(2, (16, 4), scale=0.25), normal(3, (4, 16), scale=0.5)
SAMPLES, LOGITS = normal(4, (2, 4, 16)), normal(5, (2, 16, 16))
QUERY = normal(6, (1, 16, 2, 8))
MASKED: dict[str, Any] = {"estimator": jaxkern.straight_through}
BILINEAR = (SQUARE,) * 3
DILATED: dict[str, Any] = {"dilation": jaxkern.Dilation((8, 16), (1, 2))}


def attend(query, **options):
    return jaxkern.attention(query, query, query, **options)


def attend_blocks(query, **options):
    block_mask = BlockMask.causal(query.shape[1], query.shape[1], block_size=64)
    return jaxkern.block_sparse_attention(
        query, query, query, mask=block_mask, **options
    )


def attend_dilated(query, **options):
    return jaxkern.dilated_attention(query, query, query, **DILATED | options)


def attend_around_a_ring(query):
    def local(query):
        return jaxkern.ring_attention(query, query, query, axis_name="ring")

    spec = P(None, "ring")
    split = jax.shard_map(local, mesh=mesh(ring=2), in_specs=spec, out_specs=spec)
    return split(query)


def attend_on_a_mesh(query):
    return jaxkern.context_parallel_attention(
        query, query, query, mesh=mesh(ring=2), axis_name="ring"
    )


def merge(query):
    half = query[:, :8]
    first = jaxkern.attention(query, half, half, return_lse=True)
    return jaxkern.merge_attention(*first, *first)[0]


def permute(query):
    return query[:, jaxkern.ring_permutation(16, 2, "striped")]


def rotate_slowly(query):
    scaling = jaxkern.RotaryScaling("linear", 2.0)
    return jaxkern.rotary_embedding(query, scaling=scaling)


def multiply_packed_mask(x, w):
    packed = jaxkern.pack_mask(LOGITS)
    assert isinstance(packed, jaxkern.PackedMask)
    return jaxkern.masked_matmul(x, w, packed)


def apply_unpacked_mask(x):
    return x @ jaxkern.unpack_mask(jaxkern.pack_mask(LOGITS)).astype(x.dtype)


def multiply_packed(x, w, **options):
    packed = jaxkern.pack_2_4(x)
    assert isinstance(packed, jaxkern.Packed24)
    return jaxkern.matmul_2_4(packed, w, **options)


def lose(hidden, head):
    options: dict[str, Any] = {"z_loss": 1e-4, "label_smoothing": 0.1, "softcap": 5.0}
    return jaxkern.cross_entropy(hidden, head, jnp.arange(4), chunk=5, **options)


# Each name of `jaxkern`, a function that uses it, and its differentiated arguments.
OPS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "attention": (attend, (QUERY,)),
    "BlockMask": (attend_blocks, (QUERY,)),
    "block_sparse_attention": (attend_blocks, (QUERY,)),
    "dilated_attention": (attend_dilated, (QUERY,)),
    "Dilation": (attend_dilated, (QUERY,)),
    "ring_attention": (attend_around_a_ring, (QUERY,)),
    "context_parallel_attention": (attend_on_a_mesh, (QUERY,)),
    "ring_permutation": (permute, (QUERY,)),
    "merge_attention": (merge, (QUERY,)),
    "rotary_embedding": (jaxkern.rotary_embedding, (QUERY,)),
    "RotaryScaling": (rotate_slowly, (QUERY,)),
    "cross_entropy": (lose, (X, SQUARE)),
    "straight_through": (jaxkern.straight_through, (X,)),
    "reinmax": (jaxkern.reinmax, (X,)),
    "binary_concrete": (partial(jaxkern.binary_concrete, key=KEY), (X,)),
    "gumbel_softmax": (partial(jaxkern.gumbel_softmax, key=KEY), (X,)),
    "reinmax_categorical": (partial(jaxkern.reinmax_categorical, key=KEY), (X,)),
    "masked_matmul": (
        partial(jaxkern.masked_matmul, **MASKED),
        (SAMPLES, SQUARE, LOGITS),
    ),
    "masked_bilinear": (
        partial(jaxkern.masked_bilinear, **MASKED),
        (SAMPLES, BILINEAR, (LOGITS,) * 3),
    ),
    "PackedMask": (multiply_packed_mask, (SAMPLES, SQUARE)),
    "pack_mask": (multiply_packed_mask, (SAMPLES, SQUARE)),
    "unpack_mask": (apply_unpacked_mask, (SAMPLES,)),
    "flash_mlp": (jaxkern.flash_mlp, (SAMPLES, LOGITS, LOGITS)),
    "swiglu": (jaxkern.swiglu, (X, SQUARE, SQUARE, SQUARE)),
    "low_rank_matmul": (jaxkern.low_rank_matmul, (X, PAIR)),
    "low_rank_swiglu": (jaxkern.low_rank_swiglu, (X, PAIR, PAIR, PAIR)),
    "low_rank_relu2": (
        partial(jaxkern.low_rank_relu2, sparsity="2:4-soft"),
        (X, PAIR, PAIR),
    ),
    "Packed24": (multiply_packed, (X, SQUARE)),
    "matmul_2_4": (multiply_packed, (X, SQUARE)),
    "pack_2_4": (multiply_packed, (X, SQUARE)),
    "unpack_2_4": (lambda x: jaxkern.unpack_2_4(jaxkern.pack_2_4(x)), (X,)),
    "sparsify_2_4": (jaxkern.sparsify_2_4, (X,)),
}


RNGS: dict[str, Any] = {"rngs": nnx.Rngs(0)}
LM: dict[str, Any] = {
    "vocab_size": 16,
    "context_length": 8,
    "embed_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
}
IDS = jnp.arange(32).reshape(8, 4) % 16
ENCODES: dict[str, Any] = {"decode": False}


def prune():
    pruned, _ = nn.LowRankReLU2(16, 16, rank=4, **RNGS).prune_2_4()
    assert isinstance(pruned.values["up_in"], nn.PackedWeight)
    return pruned


def packed_mlp():
    packed = nn.Packed24Linear(jaxkern.pack_2_4(SQUARE))
    up = nn.LowRankLinear(16, 16, rank=4, **RNGS)
    return nn.CompressedMLP([up], [packed], activation="relu2")


def place():
    model = nn.TransformerLM(
        **LM, mesh=nn.make_mesh(**nn.parse_mesh_sizes("fsdp=4,tensor=2")), **RNGS
    )
    assert model.mesh is not None
    places = nn.get_sharding(nnx.state(model), model.mesh, nn.SHARDING_RULES)
    nnx.update(model, jax.device_put(nnx.state(model), places))
    return model


def decode():
    model = nn.TransformerLM.from_config(nn.TransformerConfig(**LM), **RNGS)
    cache = model.make_cache(8, 4)
    assert isinstance(cache, nn.KVCache)
    features, _ = model.extend(IDS, cache)
    np.testing.assert_allclose(features, model.features(IDS), rtol=1e-4, atol=1e-5)
    return model


def mask():
    module = nn.MaskedLinear(16, 16, num_masks=2, **RNGS)
    assert isinstance(module.mask_logits, nn.MaskLogits)
    assert nn.mask_sparsity(module)["total"].shape == (2,)
    return module


# Each name of `jaxkern.nn`, a module of that name or that uses it, and an input.
MODULES: dict[str, tuple[Any, jax.Array]] = {
    "MultiHeadAttention": (partial(nn.MultiHeadAttention, 16, 2), SAMPLES),
    "attention_fn": (
        partial(nnx.MultiHeadAttention, 2, 16, attention_fn=nn.attention_fn, **ENCODES),
        SAMPLES,
    ),
    "LowRankLinear": (partial(nn.LowRankLinear, 16, 16, rank=4), X),
    "LongNet": (partial(nn.LongNet, 16, 2, num_layers=1, **DILATED), SAMPLES),
    "Bilinear": (partial(nn.Bilinear, 16, 16), X),
    "MaskedBilinear": (partial(nn.MaskedBilinear, 16, 16, num_masks=2), SAMPLES),
    "MaskedLinear": (mask, SAMPLES),
    "MaskLogits": (mask, SAMPLES),
    "mask_sparsity": (mask, SAMPLES),
    "FlashMLP": (partial(nn.FlashMLP, 2, 16, hidden_dim=16), SAMPLES),
    "LowRankReLU2": (partial(nn.LowRankReLU2, 16, 16, rank=4), X),
    "LowRankSwiGLU": (partial(nn.LowRankSwiGLU, 16, 16, rank=4), X),
    "SwiGLU": (partial(nn.SwiGLU, 16, 16), X),
    "MLP": (partial(nn.MLP, 16, 16, activation="gelu", use_bias=True), X),
    "MultiHeadMLP": (partial(nn.MultiHeadMLP, 16, 16, num_heads=2), X),
    "Packed24ReLU2": (prune, X),
    "Packed24Linear": (packed_mlp, X),
    "CompressedMLP": (packed_mlp, X),
    "PackedWeight": (prune, X),
    "QuadraticTransformer": (
        partial(nn.QuadraticTransformer, 16, 16, num_heads=2, num_layers=1),
        IDS,
    ),
    "SHARDING_RULES": (place, IDS),
    "get_sharding": (place, IDS),
    "make_mesh": (place, IDS),
    "parse_mesh_sizes": (place, IDS),
    "KVCache": (decode, IDS),
    "TransformerConfig": (decode, IDS),
    "TransformerLM": (decode, IDS),
}


def public(module) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_every_public_name_is_here():
    assert public(jaxkern) == set(OPS)
    assert public(nn) == set(MODULES)
    files = {"load", "read_config", "save", "load_native", "save_native"}
    assert public(models) == files
    assert public(compress) == {"LayerReport", "Report", "compress"}


def test_compressed_models(tmp_path):
    model = nn.TransformerLM(**LM | {"hidden_dim": 32}, **RNGS)
    method: Any = ("svd_llm", "sparsegpt")
    small, report = compress.compress(model, method=method, rank=8, calibration=IDS)
    assert isinstance(small.layers[0].mlp, nn.CompressedMLP)
    assert report.parameters < report.parameters_before
    models.save_native(small, tmp_path)
    again = models.load_native(tmp_path)
    assert again.loss(IDS, IDS) == small.loss(IDS, IDS)


def test_checkpoints(tmp_path):
    model = nn.TransformerLM(**LM, rope_pairs="halves", **RNGS)
    models.save(model, tmp_path)
    assert models.read_config(tmp_path).embed_dim == 16
    assert jax.tree.all(
        jax.tree.map(np.array_equal, nnx.state(models.load(tmp_path)), nnx.state(model))
    )


def assert_finite_and_used(value, gradients):
    """Assert that all numbers are finite, and neither value nor gradients are all 0."""
    leaves = jax.tree.leaves((value, gradients))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert np.any(value)
    assert any(np.any(gradient) for gradient in jax.tree.leaves(gradients))


def distinct(rows):
    """Make rows of the same function one case that has all their names."""
    cases: dict[int, list[str]] = {}
    for name, (function, _) in rows.items():
        cases.setdefault(id(function), []).append(name)
    return [
        pytest.param(*rows[names[0]], id=" ".join(names)) for names in cases.values()
    ]


@pytest.mark.parametrize("op, args", distinct(OPS))
def test_op(op, args):
    @jax.jit
    def run(args):
        value, vjp = jax.vjp(op, *args)
        return value, vjp(jnp.cos(jnp.arange(value.size)).reshape(value.shape))

    assert_finite_and_used(*run(args))
    # Called as in a notebook, where JAX checks the result of each program within.
    with jax.debug_nans(True), jax.debug_infs(True):
        op(*args)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("op, args", distinct(OPS))
def test_op_promotes_nothing_by_itself(op, args, dtype):
    """Some users forbid JAX to convert dtypes and to broadcast ranks implicitly."""
    args = jax.tree.map(lambda x: x.astype(dtype), args)

    def run(args):
        value, vjp = jax.vjp(op, *args)
        return value, vjp(jnp.ones_like(value))

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        _, gradients = jax.eval_shape(run, args)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("build, x", distinct(MODULES))
def test_module(build, x):
    module = build() if isinstance(build, types.FunctionType) else build(**RNGS)
    graph, state = nnx.split(module)

    @jax.jit
    def run(state, x):
        def loss(state, x):
            y = nnx.merge(graph, state)(x)
            weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype))
            return (y * weights.reshape(y.shape)).sum()

        value, gradients = jax.value_and_grad(loss, (0, 1), allow_int=True)(state, x)
        # JAX gives integers gradients of dtype float0, which hold nothing.
        slopes = [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]
        return value, slopes

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert_finite_and_used(*run(state, x))


BF16 = jnp.bfloat16
TALL, WIDE = normal(7, (64, 64), BF16, 0.125), normal(8, (1, 64, 64), BF16, 0.125)
TOKENS = normal(9, (64, 64), BF16)
FACTORS = (TALL, TALL), (TALL.T, TALL)

# One kernel of each family, and its arguments.
KERNELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "attention": (attend, (normal(10, (1, 64, 1, 16), BF16),)),
    "block-sparse": (attend_blocks, (normal(10, (1, 64, 1, 16), BF16),)),
    "dilated": (
        partial(attend_dilated, dilation=jaxkern.Dilation((32, 64), (1, 2))),
        (normal(10, (1, 64, 1, 16), BF16),),
    ),
    "flash_mlp": (jaxkern.flash_mlp, (TOKENS[None], WIDE, WIDE)),
    "low-rank": (jaxkern.low_rank_relu2, (TOKENS, *FACTORS)),
    "2:4": (multiply_packed, (TOKENS, TALL)),
    "masked": (
        partial(jaxkern.masked_matmul, **MASKED),
        (TOKENS[None], TALL, normal(11, (1, 64, 64), BF16)),
    ),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.filterwarnings("ignore:.*rank of:UserWarning")
@pytest.mark.parametrize("op, args", KERNELS.values(), ids=KERNELS)
def test_kernel(op, args):
    """Kernels in bfloat16 are as close to XLA in float32 as XLA in bfloat16 is."""
    g = normal(12, jax.eval_shape(op, *args).shape, BF16)
    kernel = partial(op, implementation="mosaic_gpu")
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        got = value_and_vjp(kernel, args, g)
    plain = value_and_vjp(partial(op, implementation="xla"), args, g)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (args, g))
    exact = value_and_vjp(partial(op, implementation="xla"), *wide)
    assert_as_close(got, plain, exact)
