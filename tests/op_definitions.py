"""Every op and module with small arguments, and how a mesh can split these."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from helpers import normal

import jaxkern
from jaxkern import BlockMask, nn
from jaxkern._masked.forms import Method

KEY = jax.random.key(0)
BLOCKS = BlockMask.local_window(16, 16, window=6, block_size=8)
DILATED: dict[str, Any] = {"dilation": jaxkern.Dilation((8, 16), (1, 2))}


class Case(NamedTuple):
    """An op, its arguments, and how these can be split over a mesh.

    places: ways to split the arrays. Each has a word for every array with a letter for
        every axis: "d" and "t" are mesh axes of 2 devices, "a" is both of them and "-"
        is none. All are tried on explicit mesh axes, the last one on automatic axes.
    manual: how `jax.shard_map` splits the arrays. The result's word follows ">", and
        the mesh axis over which the result is summed follows "+". It is None if parts
        cannot be computed by themselves.
    """

    op: Callable[..., Any]
    args: tuple[Any, ...]
    places: tuple[str, ...]
    manual: str | None = None


def case(op, args, *places, manual=None) -> Case:
    return Case(op, args, places, manual)


def weight(seed, *shape):
    return normal(seed, shape, scale=shape[-2] ** -0.5)


X = normal(0, (4, 4, 16))
W, V, U = (weight(i, 16, 16) for i in (1, 2, 3))
UP, DOWN = (weight(4, 16, 4), weight(5, 4, 16)), (weight(6, 16, 4), weight(7, 4, 16))
HEADS, BY_HEAD, BACK = normal(8, (4, 8, 8)), weight(9, 4, 8, 16), weight(10, 4, 16, 8)
LOGITS = normal(11, (4, 16, 16))
BIASES = normal(12, (16,)), normal(13, (16,)), normal(14, (16,))
Q, K1, K2 = (
    normal(15, (4, 16, 4, 8)),
    normal(16, (4, 16, 2, 8)),
    normal(17, (4, 16, 2, 8)),
)
LSE, LONG = normal(18, (4, 16, 4)), normal(19, (4, 300, 4, 8))
TARGETS, TOKENS = jnp.arange(16).reshape(4, 4), jnp.arange(32).reshape(4, 8) % 16
KEEP = jnp.arange(16)[None] < jnp.array([16, 12, 9, 16])[:, None]

low_rank_relu2 = partial(jaxkern.low_rank_relu2)
masked_matmul = partial(jaxkern.masked_matmul, estimator=jaxkern.reinmax)


def pack_and_unpack(x):
    return jaxkern.unpack_2_4(jaxkern.pack_2_4(x))


def multiply_packed(x, w):
    return jaxkern.matmul_2_4(jaxkern.pack_2_4(x), w)


def multiply_by_packed(x, up, down):
    pack = partial(jax.tree.map, lambda w: jaxkern.pack_2_4(w.T))
    return jaxkern.low_rank_relu2(x, pack(up), pack(down))


def multiply_by_packed_mask(x, w, logits):
    return jaxkern.masked_matmul(x, w, jaxkern.pack_mask(logits))


def unpack_mask(logits):
    mask = jaxkern.unpack_mask(jaxkern.pack_mask(logits))
    return jnp.where(mask, logits, 0)


def masked_bilinear(h, weights, logits, biases, **options):
    return jaxkern.masked_bilinear(
        h, weights, logits, biases=biases, estimator="straight_through", **options
    )


def attend_to_some(query, key, value, key_mask):
    mask = key_mask[:, None, None]
    return jaxkern.attention(query, key, value, mask=mask)


def attend_by_tiles(query, key, value):
    return jaxkern.attention(query, key, value, is_causal=True)


def attend_around_a_ring(query, key, value):
    """Ring attention inside `jax.shard_map`, and plain attention outside."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return jaxkern.ring_attention(query, key, value, axis_name="t")
    return jaxkern.attention(query, key, value)


def lose(hidden, head, targets, keep):
    losses, lse = jaxkern.cross_entropy(
        hidden,
        head,
        targets,
        where=keep,
        ignore_index=5,
        z_loss=0.1,
        label_smoothing=0.3,
        softcap=5.0,
        return_lse=True,
        chunk=7,
    )
    return losses + lse / 3


METHODS = get_args(Method)
PAIRS = "-- -- -- --"
OPS = {
    "swiglu": case(
        jaxkern.swiglu,
        (X, W, V, U),
        "d-- -t -t t-",
        "--t t- t- -t",
        "a-- d- t- -a",
        manual="d-- -t -t t- >d-- +t",
    ),
    "low_rank_matmul": case(
        jaxkern.low_rank_matmul,
        (X, UP),
        "d-- -- -t",
        "-dt t- --",
        manual="-dt t- -- >-d- +t",
    ),
    "low_rank_swiglu": case(
        jaxkern.low_rank_swiglu,
        (X, UP, DOWN, UP),
        "d-- -- -t -- -t t- --",
        "-dt t- -- t- -- -- --",
        manual="d-- -- -t -- -t t- -- >d-- +t",
    ),
    "low_rank_relu2": case(
        low_rank_relu2,
        (X, UP, DOWN),
        "d-- -- -t t- --",
        "dt- -d -- -- --",
        manual="d-- -- -t t- -- >d-- +t",
    ),
    "low_rank_relu2 2:4": case(
        partial(low_rank_relu2, sparsity="2:4"),
        (X, UP, DOWN),
        "d-- -- -t t- --",
        "--- -- -a a- --",
        manual="d-- -- -t t- -- >d-- +t",
    ),
    "low_rank_relu2 2:4-soft": case(
        partial(low_rank_relu2, sparsity="2:4-soft"),
        (X, UP, DOWN),
        "d-- -- -t t- --",
        manual=f"dt- {PAIRS} >dt-",
    ),
    "low_rank_relu2 2:4-static": case(
        partial(low_rank_relu2, sparsity="2:4-static"),
        (X, UP, DOWN),
        "d-- -- -t t- --",
        manual="d-- -- -t t- -- >d-- +t",
    ),
    "low_rank_relu2 feature-wise": case(
        partial(low_rank_relu2, sparsity="2:4", gradient="feature_wise"),
        (X, UP, DOWN),
        "d-- -- -t t- --",
    ),
    "flash_mlp": case(
        partial(jaxkern.flash_mlp, activation="gelu"),
        (HEADS, BY_HEAD, BACK),
        "td- t-- t--",
        "--d -dt -td",
        manual="td- t-- t-- >td-",
    ),
    "flash_mlp gated": case(
        lambda x, w1, w2, w: jaxkern.flash_mlp(x, w1, w2, w_gate=w),
        (HEADS, BY_HEAD, BACK, BY_HEAD),
        "td- t-- t-- t--",
        "d-- d-t dt- d-t",
        manual="d-- d-t dt- d-t >d-- +t",
    ),
    "sparsify_2_4": case(jaxkern.sparsify_2_4, (X,), "d-t", "--a", manual="--a >--a"),
    "sparsify_2_4 of uneven parts": case(
        jaxkern.sparsify_2_4, (X[..., :12],), "d-t", "--a"
    ),
    "sparsify_2_4 soft": case(
        partial(jaxkern.sparsify_2_4, method="soft", gradient="exact"),
        (X,),
        "d-t",
        manual="dt- >dt-",
    ),
    "sparsify_2_4 mvue": case(
        partial(jaxkern.sparsify_2_4, method="mvue", key=KEY), (X,), "d-t"
    ),
    "sparsify_2_4 static": case(
        partial(jaxkern.sparsify_2_4, method="static"), (X,), "d-t", manual="--a >--a"
    ),
    "pack_2_4 unpack_2_4": case(pack_and_unpack, (X,), "d-t", "--a", manual="--a >--a"),
    "pack_2_4 of uneven parts": case(pack_and_unpack, (X[..., :12],), "d-t", "--a"),
    "matmul_2_4": case(
        multiply_packed, (X, W), "d-- -t", "d-t t-", manual="d-t t- >d-- +t"
    ),
    "low_rank_relu2 packed": case(
        multiply_by_packed,
        (X, UP, DOWN),
        "d-- -- -t t- --",
        "dt- -d -- -- --",
        manual="d-- -- -t t- -- >d-- +t",
    ),
    "straight_through": case(
        partial(jaxkern.straight_through, derivative="sigmoid", clip=1.0),
        (X,),
        "d-t",
        manual="d-t >d-t",
    ),
    "straight_through drawn": case(
        partial(jaxkern.straight_through, key=KEY), (X,), "d-t"
    ),
    "reinmax": case(partial(jaxkern.reinmax, key=KEY), (X,), "d-t"),
    "binary_concrete": case(partial(jaxkern.binary_concrete, key=KEY), (X,), "d-t"),
    "gumbel_softmax": case(
        partial(jaxkern.gumbel_softmax, key=KEY), (X,), "d-t", "d--"
    ),
    "gumbel_softmax soft": case(
        partial(jaxkern.gumbel_softmax, key=KEY, hard=False, axis=0), (X,), "d-t"
    ),
    "reinmax_categorical": case(
        partial(jaxkern.reinmax_categorical, key=KEY), (X,), "d-t", "d--"
    ),
    **{
        f"masked_matmul {method}": case(
            partial(masked_matmul, method=method, key=KEY), (X, W, LOGITS), "d-- -t d-t"
        )
        for method in METHODS
    },
    **{
        f"masked_matmul {method} without a key": case(
            partial(masked_matmul, method=method),
            (X, W, LOGITS),
            "d-t t- dt-",
            manual="d-- -t d-t >d-t",
        )
        for method in METHODS
    },
    "masked_matmul shared": case(
        masked_matmul,
        (X, W, LOGITS[0]),
        "d-- -t -t",
        "--t t- t-",
        manual="d-- -t -t >d-t",
    ),
    "masked_bilinear": case(
        masked_bilinear,
        (X, (W, V, U), (LOGITS,) * 3, BIASES),
        "d-- -t -t t- d-t d-t dt- t t -",
        "t-- -- -- -t t-- t-- t-- - - -",
        manual="d-- -- -- -- d-- d-- d-- - - - >d--",
    ),
    "masked_bilinear drawn": case(
        partial(masked_bilinear, key=KEY),
        (X, (W, V, U), (LOGITS,) * 3, BIASES),
        "d-- -- -- -- d-- d-- d-- - - -",
    ),
    "pack_mask": case(
        multiply_by_packed_mask,
        (X, W, LOGITS),
        "d-- -- d--",
        "--- t- -t-",
        manual="d-- -t d-t >d-t",
    ),
    "unpack_mask": case(unpack_mask, (LOGITS,), "dt-", "--a", manual="d-t >d-t"),
    "attention": case(
        attend_to_some,
        (Q, K1, K2, KEEP),
        "d-t- d-t- d-t- d-",
        "---d ---- ---d d-",
        manual="d-t- d-t- d-t- d- >d-t-",
    ),
    "attention by tiles": case(
        attend_by_tiles,
        (LONG, LONG, LONG),
        "d-t- d-t- d-t-",
        manual="d-t- d-t- d-t- >d-t-",
    ),
    "merge_attention": case(
        lambda *a: jaxkern.merge_attention(*a)[0],
        (Q, LSE, 2 * Q, -LSE),
        "d-t- d-t d-t- d-t",
        "-t-- -t- -t-- -t-",
        manual="dt-- dt- dt-- dt- >dt--",
    ),
    "dilated_attention": case(
        partial(jaxkern.dilated_attention, **DILATED),
        (Q, K1, K2),
        "d-t- d-t- d-t-",
        "---d ---- ---d",
        manual="d--- d--- d--- >d---",
    ),
    "block_sparse_attention": case(
        partial(jaxkern.block_sparse_attention, mask=BLOCKS),
        (Q, K1, K2),
        "d-t- d-t- d-t-",
        "---t ---t ----",
        manual="d-t- d-t- d-t- >d-t-",
    ),
    "ring_attention": case(
        attend_around_a_ring, (Q, K1, K2), manual="dt-- dt-- dt-- >dt--"
    ),
    "rotary_embedding": case(
        jaxkern.rotary_embedding, (Q,), "d-t-", "dt--", "---a", manual="d-t- >d-t-"
    ),
    "cross_entropy": case(
        lose,
        (X, W, TARGETS, KEEP[:, 8:12]),
        "d-- -t d- d-",
        "dt- -- dt -d",
        "--d d- -- dt",
        manual="dt- -- dt dt >dt",
    ),
}


# Modules with an input. It is (batch, seq, features), or two words follow that say how
# to split it by samples and by features.
MODULES = {
    "Bilinear": (partial(nn.Bilinear, 16, 16), X),
    "FlashMLP": (
        partial(nn.FlashMLP, 4, 8, hidden_dim=16, gated=True),
        HEADS,
        "-d-",
        "-dt",
    ),
    "LongNet": (
        partial(nn.LongNet, 16, 2, num_layers=1, **DILATED),
        normal(20, (4, 16, 16)),
    ),
    "LowRankLinear": (partial(nn.LowRankLinear, 16, 16, rank=4), X),
    "LowRankReLU2": (partial(nn.LowRankReLU2, 16, 16, rank=4, sparsity="2:4"), X),
    "LowRankSwiGLU": (partial(nn.LowRankSwiGLU, 16, 16, rank=4), X),
    "MLP": (partial(nn.MLP, 16, 16, gated=True, use_bias=True), X),
    "MaskedBilinear": (partial(nn.MaskedBilinear, 16, 16, num_masks=4), X),
    "MaskedLinear": (partial(nn.MaskedLinear, 16, 16, num_masks=4), X),
    "MultiHeadAttention": (partial(nn.MultiHeadAttention, 16, 4, num_kv_heads=2), X),
    "MultiHeadMLP": (partial(nn.MultiHeadMLP, 16, 8, num_heads=4), X),
    "Packed24ReLU2": (
        lambda rngs: nn.LowRankReLU2(16, 16, rank=4, rngs=rngs).prune_2_4()[0],
        X,
    ),
    "QuadraticTransformer": (
        partial(
            nn.QuadraticTransformer,
            16,
            16,
            num_heads=2,
            num_layers=1,
            masked_layers=[0],
        ),
        TOKENS,
        "d-",
        "d-",
    ),
    "SwiGLU": (partial(nn.SwiGLU, 16, 16), X),
    "TransformerLM": (
        partial(
            nn.TransformerLM,
            16,
            8,
            embed_dim=16,
            num_layers=1,
            num_heads=4,
            hidden_dim=16,
            scan_layers=False,
        ),
        TOKENS,
        "d-",
        "dt",
    ),
}
