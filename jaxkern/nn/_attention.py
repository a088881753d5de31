"""Multi-head attention around any attention function."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from .._attention.dense import attention
from .._core.checks import (
    check_floating,
    check_integer,
    check_number,
    check_shape,
    kind_of,
    raise_unknown,
)
from .._core.sharding import on_automatic_axes
from ._common import (
    axis_metadata,
    bind,
    check_arguments,
    check_callable,
    check_dtypes,
    default_attention_kernel_init,
    scale_init,
)

QKNorm = Literal["head", "embed"]


class MultiHeadAttention(nnx.Module):
    r"""Multi-head attention whose attention function is an argument.

    $$y = \mathrm{concat}_h(\mathrm{attention}(x W_Q^h, z W_K^h, z W_V^h)) W_O$$

    with biases unless `use_bias` is False; self-attention has $z = x$. The call maps x
    (batch, seq_q, embed_dim) and z (batch, seq_kv, embed_dim) to the shape of x.

    `attention_fn(query, key, value, **options)` gets arrays (batch, seq, heads,
    head_dim), where key and value have `num_kv_heads`, and returns one of the query's
    shape. Options that stay the same are bound by `functools.partial`. Options that
    change are passed to the call of the module:

    - `MultiHeadAttention(512, 8, is_causal=True, rngs=rngs)` runs `attention`, and
      `module(x, mask=mask)` passes it a mask.
    - `attention_fn=partial(dilated_attention, dilation=Dilation((2048, 8192), (1, 4)))`
      runs dilated attention, and `module(x, key_mask=mask)` masks the padding.
    - `attention_fn=partial(block_sparse_attention, mask=block_mask)` runs block-sparse
      attention; the mask may also be passed to the call, `module(x, mask=block_mask)`.
    - `attention_fn=partial(ring_attention, axis_name="seq")` runs ring attention, if
      the module is called inside `jax.shard_map`.

    Logical axes for `nnx.get_partition_spec` are "embed", "heads" and "kv_heads".

    Args:
        embed_dim: The size of the last axis of the inputs and the output.
        num_heads: The number of heads of the query.
        num_kv_heads: The number of heads of key and value, a divisor of `num_heads`;
            None for as many.
        head_dim: The size of a head; None for embed_dim / num_heads.
        attention_fn: The attention function, see above.
        is_causal: Pass `is_causal=True` to `attention_fn`. False passes no such option,
            so a function without it fits.
        use_bias: Add biases in all four projections.
        out_bias: Add a bias in the projection back; None for `use_bias`. Qwen 2 has
            `use_bias=True, out_bias=False`.
        qk_norm: Normalize query and key before the attention, each by its own norm:
            "head" over the features of each head, "embed" over the features of all
            heads together. None does not normalize.
        sub_layer_norm: Normalize the outputs of the heads together, before the
            projection back.
        norm: Makes the norms, called as `norm(features, dtype=, param_dtype=, rngs=)`.
        gain: The factor of the initial kernels of value and output. Magneto's is
            sqrt(log(2 layers)).
        dtype: The dtype of the computation; None promotes the dtypes of inputs and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of each kernel, as a matrix of all its heads.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: `attention_fn` or `norm` cannot be called, `gain` is not a number, a
            dtype is not a floating-point dtype, or `rngs` is not an `nnx.Rngs`.
        ValueError: A size is not a positive integer or does not divide, `gain` is not
            positive and finite, or `qk_norm` is unknown.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        layer = nn.MultiHeadAttention(8, 2, is_causal=True, rngs=nnx.Rngs(0))
        print(layer(jnp.ones((2, 3, 8))).shape)
        ```
        ```text
        (2, 3, 8)
        ```

    References:
        Attention Is All You Need, section 3.2.2: https://arxiv.org/abs/1706.03762.
        qk_norm="head": ViT-22B, eq. 3, https://arxiv.org/abs/2302.05442.
        sub_layer_norm and gain: Magneto, https://arxiv.org/abs/2210.06423.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        attention_fn: Callable[..., Any] = attention,
        is_causal: bool = False,
        use_bias: bool = True,
        out_bias: bool | None = None,
        qk_norm: QKNorm | None = None,
        sub_layer_norm: bool = False,
        norm: Callable[..., nnx.Module] = nnx.LayerNorm,
        gain: float = 1.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_attention_kernel_init,
        rngs: nnx.Rngs,
    ):
        embed_dim, num_heads, kv_heads, dim = check_heads(
            "MultiHeadAttention", embed_dim, num_heads, num_kv_heads, head_dim
        )
        _check_options(attention_fn, norm, qk_norm, gain)
        dtypes = check_dtypes("MultiHeadAttention", dtype, param_dtype, rngs)

        def project(heads, name, init):
            return nnx.LinearGeneral(
                embed_dim,
                (heads, dim),
                use_bias=use_bias,
                kernel_init=init,
                kernel_metadata=axis_metadata("embed", name, None),
                bias_metadata=axis_metadata(name, None),
                **dtypes,
            )

        scaled_init = scale_init(kernel_init, gain)
        self.query = project(num_heads, "heads", kernel_init)
        self.key = project(kv_heads, "kv_heads", kernel_init)
        self.value = project(kv_heads, "kv_heads", scaled_init)
        self.out = nnx.LinearGeneral(
            (num_heads, dim),
            embed_dim,
            axis=(-2, -1),
            use_bias=use_bias if out_bias is None else out_bias,
            kernel_init=scaled_init,
            kernel_metadata=axis_metadata("heads", None, "embed"),
            bias_metadata=axis_metadata("embed"),
            **dtypes,
        )

        def norm_of(heads, across_heads):
            return norm(heads * dim if across_heads else dim, **dtypes)

        across = qk_norm == "embed"
        self.query_norm = norm_of(num_heads, across) if qk_norm else None
        self.key_norm = norm_of(kv_heads, across) if qk_norm else None
        self.sub_norm = norm_of(num_heads, True) if sub_layer_norm else None
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.head_dim = dim
        self.qk_norm: QKNorm | None = qk_norm
        options = {"is_causal": True} if is_causal else {}
        self.attention_fn = bind(attention_fn, **options)

    @on_automatic_axes(lambda query: P(*query[:-1], None))
    def __call__(
        self,
        query: Float[Array, "batch seq_q embed"],
        key: Float[Array, "batch seq_kv embed"] | None = None,
        value: Float[Array, "batch seq_kv embed"] | None = None,
        **options: Any,
    ) -> Float[Array, "batch seq_q embed"]:
        """Attend from `query` to `key`, and return the sums of `value`.

        Args:
            query: The features that attend.
            key: The features to attend to; None for `query`.
            value: The features to sum; None for `key`.
            options: The options of this call to `attention_fn`.

        Returns:
            The features of the query's tokens.

        Raises:
            TypeError: An input is not a floating-point array, or `attention_fn` does
                not take an option or does not return an array.
            ValueError: A shape does not fit, or there is a value without a key.
        """
        if key is None and value is not None:
            raise ValueError(
                "MultiHeadAttention: key must be given with value, got value alone"
            )
        key = query if key is None else key
        value = key if value is None else value
        given = {"query": query, "key": key, "value": value}
        for name, x in given.items():
            # Checked one by one, since their dtypes may differ: projections promote.
            (given[name],) = check_floating("MultiHeadAttention", **{name: x})
            shape = "batch", "seq", self.embed_dim
            check_shape("MultiHeadAttention", name, x, shape)
        return self.attend(**given, attention_fn=partial(self.attention_fn, **options))

    def attend(
        self,
        query: jax.Array,
        key: jax.Array | None = None,
        value: jax.Array | None = None,
        *,
        attention_fn: Callable[..., Any],
    ) -> jax.Array:
        """Return what the call returns, with another attention function.

        Args:
            query: The features that attend.
            key: The features to attend to; None for `query`.
            value: The features to sum; None for `key`.
            attention_fn: The attention function, in place of the module's.

        Returns:
            The features of the query's tokens.
        """
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = self.query(query), self.key(key), self.value(value)
        if self.qk_norm is not None:
            across = self.qk_norm == "embed"
            q = _normalize(self.query_norm, q, across)
            k = _normalize(self.key_norm, k, across)
        heads = attention_fn(q, k, v)
        _check_result(heads, q.shape)
        if self.sub_norm is not None:
            heads = _normalize(self.sub_norm, heads, across_heads=True)
        return self.out(heads)


def _normalize(norm, x, across_heads):
    """Normalize over the features of each head, or of all heads together."""
    if not across_heads:
        return norm(x)
    *tokens, heads, dim = x.shape
    return norm(x.reshape(*tokens, heads * dim)).reshape(x.shape)


def check_heads(
    op: str,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
) -> tuple[int, int, int, int]:
    """Return the sizes as Python integers, and the last two also where they are None.

    Returns:
        `embed_dim`, `num_heads`, `num_kv_heads` and `head_dim`.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    embed_dim, num_heads, kv_heads = check_arguments(
        op, None, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=kv_heads
    )
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            f"{op}: num_heads must divide embed_dim={embed_dim} unless head_dim is "
            f"given, got {num_heads}"
        )
    if num_heads % kv_heads:
        raise ValueError(
            f"{op}: num_kv_heads must divide num_heads={num_heads}, got {kv_heads}"
        )
    dim = embed_dim // num_heads if head_dim is None else head_dim
    return embed_dim, num_heads, kv_heads, check_integer(op, "head_dim", dim)


def _check_options(attention_fn, norm, qk_norm, gain) -> None:
    op = "MultiHeadAttention"
    for name, function in [("attention_fn", attention_fn), ("norm", norm)]:
        check_callable(op, name, function)
    if qk_norm not in (None, *get_args(QKNorm)):
        raise_unknown(op, "qk_norm", qk_norm, (None, *get_args(QKNorm)))
    check_number(op, "gain", gain, positive=True)


def _check_result(heads, shape) -> None:
    op = "MultiHeadAttention"
    if not isinstance(heads, jax.Array):
        kind = kind_of(heads)
        raise TypeError(f"{op}: attention_fn must return one array, got {kind}")
    if heads.shape != shape:
        raise ValueError(
            f"{op}: attention_fn must return the query's shape {shape}, "
            f"got {heads.shape}"
        )
