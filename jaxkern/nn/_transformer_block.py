"""One layer of the language model, and the initial values of its parameters."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float, Integer

from .._attention.rotary import Pairs, rotary_embedding
from .._attention.rotary_scaling import RotaryScaling
from ._attention import MultiHeadAttention
from ._attention_checks import QKNorm
from ._cache import KVCache, remember
from ._causal_attention import CausalAttention
from ._common import bind

NormPlacement = Literal["pre", "post", "both"]
# Standard deviations at which the initial normal distributions are cut.
CUT = 3.0
embedding_init = nnx.initializers.truncated_normal(1.0, lower=-CUT, upper=CUT)


def linear_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw from a normal of variance 2 / (d_in + d_out), cut at three deviations."""
    std = math.sqrt(2 / (shape[-2] + shape[-1]))
    init = nnx.initializers.truncated_normal(std, lower=-CUT, upper=CUT)
    return init(key, shape, dtype)


class LayerKind(NamedTuple):
    """The options in which layers with equal parameters differ from each other.

    Attributes:
        window: The tokens that a query sees, its own included; None for all before it.
        rope_theta: As in `rotary_embedding`, like the others.
    """

    window: int | None
    rope_theta: float
    pairs: Pairs
    rotary_dim: int | None
    scaling: RotaryScaling | None

    def rotate(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        """Rotate query or key."""
        return rotary_embedding(
            x,
            positions,
            rope_theta=self.rope_theta,
            pairs=self.pairs,
            rotary_dim=self.rotary_dim,
            scaling=self.scaling,
        )


def _attend(query, key, value, *, positions, kind, attention_fn, **options):
    """Rotate query and key, and attend."""
    if kind.window is not None:
        options["window"] = kind.window
    query, key = kind.rotate(query, positions), kind.rotate(key, positions)
    return attention_fn(query, key, value, **options)


class TransformerBlock(nnx.Module):
    """Attention and an MLP, each beside a residual connection, with norms.

    The arguments are those of `TransformerLM`, but for two: `attention` is a choice of
    `choose_attention`, and `norm` makes a norm.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        num_kv_heads: int,
        head_dim: int,
        attention: CausalAttention,
        attention_sinks: bool,
        qk_norm: QKNorm | None,
        qkv_bias: bool,
        out_bias: bool,
        norm: Callable[..., nnx.Module],
        norm_placement: NormPlacement,
        mlp: Callable[..., nnx.Module],
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        before = norm_placement in ("pre", "both")
        after = norm_placement in ("post", "both")

        def norm_if(wanted):
            return norm(embed_dim, **dtypes) if wanted else None

        self.attention_norm, self.mlp_norm = norm_if(before), norm_if(before)
        self.attention_post_norm, self.mlp_post_norm = norm_if(after), norm_if(after)
        self.attention_fn = bind(_attend, attention_fn=attention.within)
        self.attend_to_cache = attention.to_cache
        self.attention = MultiHeadAttention(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            attention_fn=self.attention_fn,
            use_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            attention_sinks=attention_sinks,
            # The features of a head are no features of the model.
            norm=partial(norm, axis=None),
            kernel_init=linear_init,
            **dtypes,
        )
        self.mlp = mlp(embed_dim, hidden_dim, **dtypes)

    def __call__(
        self,
        x: Float[Array, "batch seq embed_dim"],
        positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
        *,
        kind: LayerKind,
        **options: Any,
    ) -> Float[Array, "batch seq embed_dim"]:
        attend = partial(self.attention, positions=positions, kind=kind, **options)
        return self._add_mlp(self._add_attention(x, attend))

    def _add_attention(self, x, attend):
        y = attend(_apply(self.attention_norm, x))
        return x + _apply(self.attention_post_norm, y)

    def _add_mlp(self, x):
        return x + _apply(self.mlp_post_norm, self.mlp(_apply(self.mlp_norm, x)))

    def extend(
        self,
        x: Float[Array, "batch seq embed_dim"],
        cache: KVCache,
        *,
        kind: LayerKind,
        number: int | Integer[Array, ""],
        count: int | Integer[Array, " batch"],
    ) -> tuple[Float[Array, "batch seq embed_dim"], KVCache]:
        """Attend from new tokens to the cached ones and to themselves.

        Args:
            x: The features of the new tokens.
            cache: The keys and values of the tokens before them.
            kind: As in the call.
            number: The number of this layer among those of its kind.
            count: How many of the new tokens the cache keeps.

        Returns:
            The output of the block, and the cache with the new keys and values of this
            layer, but with the length that it had.

        Raises:
            ValueError: The attention was given an `attention_fn` other than the
                model's.
        """
        if self.attention.attention_fn != self.attention_fn:
            raise ValueError(
                "TransformerLM: attention_fn of a block must be the model's own for a "
                "cache, got another one; generate(cache=False) needs no cache"
            )
        positions = cache.positions(x.shape[1])  # (batch or 1, seq)

        def attend_to_cache(query, key, value, **options):
            nonlocal cache
            # Positions of one row have no axis of rows.
            turns = positions if len(positions) == len(x) else positions[0]
            query, key = kind.rotate(query, turns), kind.rotate(key, turns)
            cache, keys, values, at = remember(
                cache, key, value, window=kind.window, number=number, count=count
            )
            behind = positions[:, :, None] - at[:, None]
            seen = (behind >= 0) & (at >= 0)[:, None]
            if kind.window is not None:
                seen &= behind < kind.window
            args = promote_dtype((query, keys, values), dtype=query.dtype)
            return self.attend_to_cache(
                *args, seen=seen[:, None], positions=positions, **options
            )

        attend = partial(self.attention.attend, attention_fn=attend_to_cache)
        x = self._add_mlp(self._add_attention(x, attend))
        return x, cache


def _apply(norm, x):
    return x if norm is None else norm(x)
