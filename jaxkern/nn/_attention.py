"""Multi-head attention around any attention function."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from .._attention.decoder import with_sinks
from .._attention.dense import attention
from .._core.checks import (
    check_flag,
    check_floating,
    check_shape,
)
from .._core.sharding import on_automatic_axes
from ._attention_checks import QKNorm, check_heads, check_options
from ._attention_fn import check_dropout_rate, check_heads_of, in_flax_form
from ._attention_state import (
    CACHED,
    Result,
    Sown,
    attend_to_cache,
    dropout_options,
    empty_cache,
    first_flag,
    read_cache,
)
from ._common import (
    axis_metadata,
    bind,
    check_arguments,
    check_dtypes,
    default_attention_kernel_init,
    make_kernel,
    scale_init,
    takes_return_lse,
)


class MultiHeadAttention(nnx.Module):
    r"""Multi-head attention whose attention function is an argument.

    $$y = \mathrm{concat}_h(\mathrm{attention}(x W_Q^h, z W_K^h, z W_V^h)) W_O$$

    with biases unless `use_bias` is False; self-attention has $z = x$. The call maps x
    (batch, seq_q, embed_dim) and z (batch, seq_kv, in_kv_features) to
    (batch, seq_q, out_features).

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

    Dropout, `sow_weights` and `decode` have flax's names and meanings, and need
    `jaxkern.attention` or a function with the arguments of `nn.attention_fn`. Dropout
    and `sow_weights` keep all weights in memory. The parameters of
    `flax.nnx.MultiHeadAttention` fit: its `query`, `key`, `value` and `out` are ours.

    Logical axes for `nnx.get_partition_spec` are "embed", "heads" and "kv_heads".

    Args:
        embed_dim: The size of the last axis of the query.
        num_heads: The number of heads of the query.
        num_kv_heads: The number of heads of key and value, a divisor of `num_heads`;
            None for as many.
        head_dim: The size of a head; None for embed_dim / num_heads. flax's
            `qkv_features` is head_dim * num_heads.
        out_features: The size of the last axis of the output; None for `embed_dim`.
        in_kv_features: The size of the last axis of key and value, which in
            encoder-decoder models is the encoder's; None for `embed_dim`.
        attention_fn: The attention function, see above.
        is_causal: Pass `is_causal=True` to `attention_fn`. False passes no such option,
            so a function without it fits.
        use_bias: Add biases in all four projections.
        out_bias: Add a bias in the projection back; None for `use_bias`. Qwen 2 has
            `use_bias=True, out_bias=False`.
        qk_norm: Normalize query and key before the attention, each by its own norm:
            "head" over the features of each head, "embed" over the features of all
            heads together. None does not normalize.
        attention_sinks: Give each head a learned logit that takes part in the softmax
            and has no value (gpt-oss). `attention_fn` is called with `return_lse=True`
            and returns a pair, as `attention` does.
        sub_layer_norm: Normalize the outputs of the heads together, before the
            projection back.
        norm: Makes the norms, called as `norm(features, dtype=, param_dtype=, rngs=)`.
        gain: The factor of the initial kernels of value and output. Magneto's is
            sqrt(log(2 layers)).
        dropout_rate: The probability that an attention weight is dropped, which is 0.1
            in BERT, GPT-2 and ViT, and 0 in today's language models.
        broadcast_dropout: Drop the same weights in all sequences and heads.
        deterministic: Drop no weight. The call, `module.eval()` and `module.train()`
            change it; with a dropout rate one of them must set it.
        decode: Attend to the tokens of the cache, which `init_cache` makes. The call
            and `nnx.view` change it.
        keep_rngs: Keep a stream of random keys for the dropout, `rngs.dropout.fork()`,
            where `dropout_rate` is not 0; otherwise each call needs `rngs`.
        dtype: The dtype of the computation; None promotes the dtypes of inputs and
            parameters.
        param_dtype: The dtype of the parameters.
        kernel_init: The initializer of each kernel, as a matrix of all its heads.
        rngs: The random keys for the parameters, and for the dropout.

    Raises:
        TypeError: `attention_fn` or `norm` cannot be called, `gain` is not a number, a
            flag is neither True nor False, a dtype is not a floating-point dtype, or
            `rngs` is not an `nnx.Rngs`.
        ValueError: A size is not a positive integer or does not divide, `gain` is not
            positive and finite, `qk_norm` is unknown, `dropout_rate` is not in [0, 1),
            `attention_fn` has no dropout, or it has no option `return_lse` for
            `attention_sinks`, which go without dropout.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        layer = nn.MultiHeadAttention(8, 2, is_causal=True, rngs=nnx.Rngs(0))
        x = jnp.ones((2, 3, 8))
        print(layer(x).shape)

        layer.init_cache(x.shape)
        for i in range(3):
            token = layer(x[:, i : i + 1], decode=True)
        assert jnp.allclose(token[:, 0], layer(x)[:, 2], atol=1e-6)
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
        out_features: int | None = None,
        in_kv_features: int | None = None,
        attention_fn: Callable[..., Any] = attention,
        is_causal: bool = False,
        use_bias: bool = True,
        out_bias: bool | None = None,
        qk_norm: QKNorm | None = None,
        attention_sinks: bool = False,
        sub_layer_norm: bool = False,
        norm: Callable[..., nnx.Module] = nnx.LayerNorm,
        gain: float = 1.0,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool | None = None,
        decode: bool | None = None,
        keep_rngs: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_attention_kernel_init,
        rngs: nnx.Rngs,
    ):
        op = "MultiHeadAttention"
        embed_dim, num_heads, kv_heads, dim = check_heads(
            op, embed_dim, num_heads, num_kv_heads, head_dim
        )
        given = {"out_features": out_features, "in_kv_features": in_kv_features}
        sizes = {name: embed_dim if x is None else x for name, x in given.items()}
        out_features, in_kv_features = check_arguments(op, None, **sizes)
        check_options(attention_fn, norm, qk_norm, gain)
        rate = check_dropout_rate(op, dropout_rate)
        if rate:
            in_flax_form(op, attention_fn, f"for dropout_rate={rate}")
        check_flag(
            op,
            broadcast_dropout=broadcast_dropout,
            keep_rngs=keep_rngs,
            attention_sinks=attention_sinks,
        )
        if attention_sinks and not takes_return_lse(attention_fn):
            raise ValueError(
                f"{op}: attention_fn must have an option return_lse for "
                "attention_sinks, got one without"
            )
        if attention_sinks and rate:
            raise ValueError(
                f"{op}: attention_sinks must be False for dropout_rate={rate}, got True"
            )
        dtypes = check_dtypes(op, dtype, param_dtype, rngs)

        def project(features, heads, name, init):
            return nnx.LinearGeneral(
                features,
                (heads, dim),
                use_bias=use_bias,
                kernel_init=init,
                kernel_metadata=axis_metadata("embed", name, None),
                bias_metadata=axis_metadata(name, None),
                **dtypes,
            )

        scaled_init = scale_init(kernel_init, gain)
        self.query = project(embed_dim, num_heads, "heads", kernel_init)
        self.key = project(in_kv_features, kv_heads, "kv_heads", kernel_init)
        self.value = project(in_kv_features, kv_heads, "kv_heads", scaled_init)
        self.out = nnx.LinearGeneral(
            (num_heads, dim),
            out_features,
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
        zeros, shape = nnx.initializers.zeros, (num_heads,)
        self.sinks = (
            make_kernel(zeros, rngs, shape, param_dtype, ("heads",))
            if attention_sinks
            else None
        )
        self.embed_dim = embed_dim
        self.out_features = out_features
        self.in_kv_features = in_kv_features
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.head_dim = dim
        self.qk_norm: QKNorm | None = qk_norm
        options = {"is_causal": True} if is_causal else {}
        self.attention_fn = bind(attention_fn, **options)
        self.dropout_rate = rate
        self.broadcast_dropout = broadcast_dropout
        self.deterministic = deterministic
        self.decode = decode
        self.rngs = rngs.dropout.fork() if keep_rngs and rate else None
        self.cached_key: nnx.Cache[jax.Array] | None = nnx.data(None)
        self.cached_value: nnx.Cache[jax.Array] | None = nnx.data(None)
        self.cache_index: nnx.Cache[jax.Array] | None = nnx.data(None)

    def __call__(
        self,
        query: Float[Array, "batch seq_q embed"],
        key: Float[Array, "batch seq_kv embed_kv"] | None = None,
        value: Float[Array, "batch seq_kv embed_kv"] | None = None,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        **options: Any,
    ) -> Float[Array, "batch seq_q out_features"]:
        """Attend from `query` to `key`, and return the sums of `value`.

        Args:
            query: The features that attend.
            key: The features to attend to; None for `query`.
            value: The features to sum; None for `key`.
            deterministic: Drop no weight; None for the module's.
            rngs: The random keys of the dropout; None for the module's.
            sow_weights: Store the weights before dropout, (batch, heads, seq_q,
                seq_kv), as the `nnx.Intermediate` "attention_weights", which
                `nnx.capture` and `nnx.pop` collect.
            decode: Put the tokens behind those of the cache, and attend to all of them
                causally; None for the module's. A mask in the options has the
                cache's length as its last axis.
            options: The options of this call to `attention_fn`.

        Returns:
            The features of the query's tokens.

        Raises:
            TypeError: An input is not a floating-point array, a flag is neither True
                nor False, or `attention_fn` does not take an option or does not return
                an array.
            ValueError: A shape does not fit, there is a value without a key, dropout
                lacks `deterministic` or `rngs`, the cache is missing or full (as far as
                its length is known), or `attention_fn` has no such option.
        """
        op = "MultiHeadAttention"
        if key is None and value is not None:
            raise ValueError(f"{op}: key must be given with value, got value alone")
        sizes = {"query": self.embed_dim} | dict.fromkeys(
            ["key", "value"], self.in_kv_features
        )
        key = query if key is None else key
        value = key if value is None else value
        given = {"query": query, "key": key, "value": value}
        for name, x in given.items():
            # Checked one by one, since their dtypes may differ: projections promote.
            (given[name],) = check_floating(op, **{name: x})
            check_shape(op, name, x, ("batch", "seq", sizes[name]))
        decode = bool(first_flag(op, "decode", decode, self.decode, False))
        check_flag(op, sow_weights=sow_weights)
        added = dropout_options(self, deterministic, rngs)
        if decode or sow_weights or added:
            because = f"for decode={decode}, sow_weights={sow_weights} and dropout"
            in_flax_form(op, self.attention_fn, because)
            if self.sinks is not None and (sow_weights or added):
                raise ValueError(
                    f"{op}: attention_sinks must be False {because}, got True"
                )
        cache = read_cache(self, given["query"], given["key"]) if decode else None
        result = self._call(given, options | added, sow_weights, cache)
        # Results are stored here, since on explicit mesh axes the call has copies of
        # the module.
        for weights in result.weights:
            self.sow(nnx.Intermediate, "attention_weights", weights)
        for name, x in zip(CACHED, result.cache, strict=False):
            getattr(self, name).set_value(x)
        return result.out

    @on_automatic_axes(
        lambda given: Result(
            P(*given["query"][:-1], None),
            P(given["query"][0]),
            P(given["query"][0]),
        )
    )
    def _call(self, given, options, sow_weights, cache) -> "Result":
        """Attend, without a change to the module."""
        sown, function = Sown([]), self.attention_fn
        if sow_weights:
            options = options | {"module": sown}
        if {"dropout_rng", "module"} & options.keys():
            function = in_flax_form("MultiHeadAttention", function, "")
        function = partial(function, **options)
        if cache is None:
            return Result(self.attend(**given, attention_fn=function), sown.weights, [])
        grown = []

        def attend(query, key, value, **more):
            call = partial(function, **more)
            out, cached = attend_to_cache(call, query, key, value, cache)
            grown.extend(cached)
            return out

        return Result(self.attend(**given, attention_fn=attend), sown.weights, grown)

    def init_cache(
        self, input_shape: tuple[int, ...], dtype: Dtype = jnp.float32
    ) -> None:
        """Make an empty cache, in place of the one that there is.

        Args:
            input_shape: The shape of all tokens, (batch, seq, embed).
            dtype: The dtype in which keys and values are stored.

        Raises:
            TypeError: `dtype` is not a floating-point dtype.
            ValueError: A size is not an integer, or is negative.
        """
        arrays = empty_cache(input_shape, dtype, self.num_kv_heads, self.head_dim)
        self.cached_key, self.cached_value, self.cache_index = map(nnx.Cache, arrays)

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Set the flags for `nnx.view`, and make a cache where both sizes are given."""
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode
        if decode and batch_size is not None and max_length is not None:
            self.init_cache((batch_size, max_length, self.embed_dim))

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
        if self.sinks is None:
            heads = attention_fn(q, k, v)
            check_heads_of("MultiHeadAttention", heads, q.shape)
        else:
            heads, lse = attention_fn(q, k, v, return_lse=True)
            check_heads_of("MultiHeadAttention", heads, q.shape)
            heads = with_sinks(heads, lse, self.sinks[...])
        if self.sub_norm is not None:
            heads = _normalize(self.sub_norm, heads, across_heads=True)
        return self.out(heads)


def _normalize(norm, x, across_heads):
    """Normalize over the features of each head, or of all heads together."""
    if not across_heads:
        return norm(x)
    *tokens, heads, dim = x.shape
    return norm(x.reshape(*tokens, heads * dim)).reshape(x.shape)
