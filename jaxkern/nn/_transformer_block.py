"""One layer of the language model, and the initial values of its parameters."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer

from .._attention.dense import attention
from .._attention.rotary import rotary_embedding
from ._attention import MultiHeadAttention
from ._common import axis_metadata, bind, check_callable
from ._sharding import attend_on_mesh

# Added to the mean square in RMSNorm.
EPSILON = 1e-5
# Standard deviations at which the initial normal distributions are cut.
CUT = 3.0
embedding_init = nnx.initializers.truncated_normal(1.0, lower=-CUT, upper=CUT)


def linear_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw from a normal of variance 2 / (d_in + d_out), cut at three deviations."""
    std = math.sqrt(2 / (shape[-2] + shape[-1]))
    init = nnx.initializers.truncated_normal(std, lower=-CUT, upper=CUT)
    return init(key, shape, dtype)


def make_norm(features: int, **dtypes: Any) -> nnx.RMSNorm:
    """Make an RMSNorm whose scale has the logical axis "embed"."""
    metadata = axis_metadata("embed")
    return nnx.RMSNorm(features, epsilon=EPSILON, scale_metadata=metadata, **dtypes)


def choose_attention(attention_fn: Any, mesh: Mesh | None) -> Callable[..., Any]:
    """Return the given function or `attention`, causal, and on the mesh if any."""
    if attention_fn is not None:
        return _causal(attention_fn)
    if mesh is not None:
        return bind(attend_on_mesh, mesh=mesh, is_causal=True)
    return bind(attention, is_causal=True)


def _causal(attention_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Bind `is_causal=True` to a function that has such an option."""
    check_callable("TransformerLM", "attention_fn", attention_fn)
    has_option = "is_causal" in inspect.signature(attention_fn).parameters
    return bind(attention_fn, **({"is_causal": True} if has_option else {}))


def _attend(query, key, value, *, positions, rope_theta, attention_fn, **options):
    """Rotate query and key, and attend."""
    rotate = partial(rotary_embedding, positions=positions, rope_theta=rope_theta)
    query, key = rotate(query), rotate(key)
    return attention_fn(query, key, value, **options)


class TransformerBlock(nnx.Module):
    """Attention and an MLP, each behind a norm and beside a residual connection.

    The arguments are those of `TransformerLM`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        num_kv_heads: int,
        rope_theta: float,
        attention_fn: Callable[..., Any],
        mlp: Callable[..., nnx.Module],
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = partial(make_norm, embed_dim, **dtypes)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention_fn = bind(
            _attend, rope_theta=rope_theta, attention_fn=attention_fn
        )
        self.attention = MultiHeadAttention(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            attention_fn=self.attention_fn,
            use_bias=False,
            kernel_init=linear_init,
            **dtypes,
        )
        self.mlp = mlp(embed_dim, hidden_dim, **dtypes)
        self.rope_theta = rope_theta

    def __call__(
        self,
        x: Float[Array, "batch seq embed_dim"],
        positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
        **options: Any,
    ) -> Float[Array, "batch seq embed_dim"]:
        x = x + self.attention(self.attention_norm(x), positions=positions, **options)
        return x + self.mlp(self.mlp_norm(x))

    def extend(
        self,
        x: Float[Array, "batch seq embed_dim"],
        keys: Float[Array, "batch capacity kv_heads dim"],
        values: Float[Array, "batch capacity kv_heads dim"],
        length: Integer[Array, ""] | Integer[Array, " batch"],
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

        Returns:
            The output of the block, and keys and values with those of the new tokens.

        Raises:
            ValueError: The attention was given an `attention_fn` other than the
                model's.
        """
        of = self.attention
        if of.attention_fn != self.attention_fn:
            raise ValueError(
                "TransformerLM: attention_fn of a block must be the model's own for a "
                "cache, got another one; generate(cache=False) needs no cache"
            )
        normed = self.attention_norm(x)
        # (seq,), or (batch, seq) where sequences differ in length
        order = jnp.arange(x.shape[1], dtype=length.dtype)
        order = jnp.expand_dims(order, range(length.ndim))
        positions = length[..., None] + order
        rotate = partial(
            rotary_embedding, positions=positions, rope_theta=self.rope_theta
        )
        query, key, value = of.to_heads(normed, normed, normed)
        query, key = rotate(query), rotate(key)
        keys, values = _put(keys, key, length), _put(values, value, length)
        places = jnp.arange(keys.shape[1], dtype=length.dtype)
        places = jnp.expand_dims(places, range(positions.ndim))
        seen = positions[..., None] >= places
        mask = seen.reshape(-1, 1, *seen.shape[-2:])
        args = promote_dtype((query, keys, values), dtype=query.dtype)
        heads: Any = attention(*args, mask=mask)
        x = x + of.from_heads(heads)
        return x + self.mlp(self.mlp_norm(x)), keys, values


def _put(kept, new, length):
    """Put `new` behind the first `length` tokens of `kept`.

    `length` is one for all sequences, or one for each.
    """

    def put(kept, new, length):
        return lax.dynamic_update_slice_in_dim(kept, new, length, axis=kept.ndim - 3)

    new = new.astype(kept.dtype)
    return jax.vmap(put)(kept, new, length) if length.ndim else put(kept, new, length)


def make_layers(make_block, num_layers: int, scan_layers: bool, rngs: nnx.Rngs):
    """Make the layers, stacked or in a list.

    Each has a key of its own, which is the same in both forms.
    """

    def make(key):
        return make_block(rngs=nnx.Rngs(key))

    keys = jax.random.split(rngs.params(), num_layers)
    if not scan_layers:
        return nnx.List(make(key) for key in keys)
    return nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layers"})(keys)
