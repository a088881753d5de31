"""One layer of the language model, and the initial values of its parameters."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer

from .._attention.decoder import decoder_attention
from .._attention.rotary import Pairs, rotary_embedding
from .._attention.rotary_scaling import RotaryScaling
from ._attention import MultiHeadAttention, QKNorm
from ._common import bind, check_callable
from ._sharding import attend_on_mesh

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
    """What differs between the layers of a model that have equal parameters.

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


def choose_attention(
    attention_fn: Any, mesh: Mesh | None, options: dict[str, Any]
) -> Callable[..., Any]:
    """Return the given function or ours, causal, and on the mesh if any.

    Args:
        options: The scale and the softcap, where they are given.
    """
    if attention_fn is not None:
        return bind(_causal(attention_fn), **options)
    if mesh is not None:
        return bind(attend_on_mesh, mesh=mesh, is_causal=True, **options)
    return bind(decoder_attention, is_causal=True, **options)


def _causal(attention_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Bind `is_causal=True` to a function that has such an option."""
    check_callable("TransformerLM", "attention_fn", attention_fn)
    has_option = "is_causal" in inspect.signature(attention_fn).parameters
    return bind(attention_fn, **({"is_causal": True} if has_option else {}))


def _attend(query, key, value, *, positions, kind, attention_fn, **options):
    """Rotate query and key, and attend."""
    if kind.window is not None:
        options["window"] = kind.window
    query, key = kind.rotate(query, positions), kind.rotate(key, positions)
    return attention_fn(query, key, value, **options)


class TransformerBlock(nnx.Module):
    """Attention and an MLP, each beside a residual connection, with norms.

    The arguments are those of `TransformerLM`, but for two: `attention_fn` is a choice
    of `choose_attention`, whose `attention_options` attend to cached keys as well, and
    `norm` makes a norm.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        num_kv_heads: int,
        head_dim: int,
        attention_fn: Callable[..., Any],
        attention_options: dict[str, Any],
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
        self.attention_fn = bind(_attend, attention_fn=attention_fn)
        self.cached_attention_fn = bind(decoder_attention, **attention_options)
        self.attention = MultiHeadAttention(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            attention_fn=self.attention_fn,
            use_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
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
        keys: Float[Array, "batch capacity kv_heads dim"],
        values: Float[Array, "batch capacity kv_heads dim"],
        length: Integer[Array, ""] | Integer[Array, " batch"],
        kind: LayerKind,
    ) -> tuple[
        Float[Array, "batch seq embed_dim"],
        Float[Array, "batch capacity kv_heads dim"],
        Float[Array, "batch capacity kv_heads dim"],
    ]:
        """Attend from new tokens to the cached keys and values and to themselves.

        Args:
            x: The features of the new tokens.
            keys: The keys of the tokens before them, in the first `length` places.
            values: Their values.
            length: Their number, one for all sequences or one for each.
            kind: As in the call.

        Returns:
            The output of the block, and keys and values with those of the new tokens.

        Raises:
            ValueError: The attention was given an `attention_fn` other than the
                model's.
        """
        if self.attention.attention_fn != self.attention_fn:
            raise ValueError(
                "TransformerLM: attention_fn of a block must be the model's own for a "
                "cache, got another one; generate(cache=False) needs no cache"
            )
        # (seq,), or (batch, seq) where sequences differ in length
        order = jnp.arange(x.shape[1], dtype=length.dtype)
        order = jnp.expand_dims(order, range(length.ndim))
        positions = length[..., None] + order
        grown = []

        def attend_to_cache(query, key, value):
            query, key = kind.rotate(query, positions), kind.rotate(key, positions)
            grown.extend((_put(keys, key, length), _put(values, value, length)))
            places = jnp.arange(keys.shape[1], dtype=length.dtype)
            behind = positions[..., None] - jnp.expand_dims(
                places, range(positions.ndim)
            )
            seen = behind >= 0
            if kind.window is not None:
                seen &= behind < kind.window
            mask = seen.reshape(-1, 1, *seen.shape[-2:])
            args = promote_dtype((query, *grown), dtype=query.dtype)
            return self.cached_attention_fn(*args, mask=mask)

        attend = partial(self.attention.attend, attention_fn=attend_to_cache)
        x = self._add_mlp(self._add_attention(x, attend))
        return x, *grown


def _apply(norm, x):
    return x if norm is None else norm(x)


def _put(kept, new, length):
    """Put `new` behind the first `length` tokens of `kept`.

    `length` is one for all sequences, or one for each.
    """

    def put(kept, new, length):
        return lax.dynamic_update_slice_in_dim(kept, new, length, axis=kept.ndim - 3)

    new = new.astype(kept.dtype)
    return jax.vmap(put)(kept, new, length) if length.ndim else put(kept, new, length)
