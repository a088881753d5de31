"""The decoder-only transformer language model."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax import export, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Integer, Key, UInt32

from .._attention.ring import ring_permutation
from .._core.checks import (
    Number,
    as_int32,
    check_array,
    check_integer,
    check_number,
    check_shape,
)
from .._core.precision import widen
from .._core.sharding import on_automatic_axes
from .._cross_entropy import (
    check_loss_options,
    check_targets,
    cross_entropy,
    read_targets,
)
from ._common import (
    check_arguments,
    check_callable,
    check_dtypes,
    check_range,
    check_tokens,
    known,
    make_kernel,
    read_tokens,
)
from ._generate import check_sampling, generate
from ._mlp import SwiGLU
from ._sharding import BATCH, check_batch, check_mesh
from ._transformer_block import (
    TransformerBlock,
    choose_attention,
    embedding_init,
    linear_init,
    make_layers,
    make_norm,
)


class KVCache(NamedTuple):
    """The keys and values of the tokens so far, of all layers, and their number.

    `TransformerLM.make_cache` makes an empty one, and `TransformerLM.extend` returns
    one with more tokens. It is a named tuple, a pytree, and `jax.export` serializes it.
    Two are equal if their arrays are.

    Attributes:
        keys: The rotated keys.
        values: The values.
        length: The number of tokens, one for all sequences or one for each.

    Examples:
        ```python
        import jax.numpy as jnp
        from jaxkern import nn

        empty = jnp.zeros((1, 2, 8, 2, 4))  # (layers, batch, capacity, kv_heads, dim)
        cache = nn.KVCache(empty, empty, jnp.int32(0))
        print(cache.keys.shape, cache.length)
        ```
        ```text
        (1, 2, 8, 2, 4) 0
        ```
    """

    keys: Float[Array, "layers batch capacity kv_heads dim"]
    values: Float[Array, "layers batch capacity kv_heads dim"]
    length: Integer[Array, ""] | Integer[Array, " batch"]

    # Without these methods a comparison of named tuples would ask arrays for their
    # truth value, which they do not have.
    def __eq__(self, other: object) -> bool:
        """Whether all arrays are equal; not under `jit`."""
        return isinstance(other, KVCache) and all(map(np.array_equal, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise TypeError("unhashable type: 'KVCache'")


export.register_namedtuple_serialization(KVCache, serialized_name="jaxkern.nn.KVCache")


def _places_with_cache(tokens: P) -> tuple[P, KVCache]:
    batch = tokens[:1]
    return P(*batch), KVCache._make([P(None, *batch), P(None, *batch), P()])


class TransformerLM(nnx.Module):
    r"""A decoder-only language model: pre-norm, rotary positions, SwiGLU, no biases.

    $$h_0 = E_{\mathrm{tokens}}, \quad
    a_l = h_l + \mathrm{attention}(\mathrm{norm}(h_l)), \quad
    h_{l+1} = a_l + \mathrm{mlp}(\mathrm{norm}(a_l)), \quad
    \mathrm{logits} = \mathrm{norm}(h_L) W_{\mathrm{head}}$$

    The call maps tokens (batch, seq) to logits (batch, seq, vocab_size). Norms are
    RMSNorm with $\varepsilon = 10^{-5}$, in float32. Query and key are rotated by
    `jaxkern.rotary_embedding` with "interleaved" pairs. Kernels are drawn from normal
    distributions of variance 2 / (d_in + d_out), and embeddings of variance 1, both cut
    at three standard deviations.

    With `scan_layers` the parameters of the layers are stacked along a first axis and
    run by one `lax.scan`, so compiling takes as long as for one layer. Parameters and
    results do not depend on it.

    Logical axes for `nnx.get_partition_spec` are "vocab", "embed", "heads", "kv_heads",
    "mlp", and "layers" for the axis of stacked layers.

    Args:
        vocab_size: The number of different tokens.
        context_length: The length of the longest sequence.
        embed_dim: The number of features of a token.
        num_layers: The number of blocks.
        num_heads: The number of heads of the query.
        hidden_dim: The hidden size of the MLP.
        rope_theta: The base of the rotary frequencies.
        num_kv_heads: The number of heads of key and value, a divisor of `num_heads`;
            None for as many.
        tie_embeddings: Use the embeddings as the head, too. They then start as the head
            would.
        attention_fn: Called as `attention_fn(query, key, value, **options)` with arrays
            (batch, seq, heads, head_dim), and returns one of the query's shape; None
            for `jaxkern.attention`. A function with an option `is_causal` gets True
            for it; any other must be causal itself.
        mlp: Makes the MLP of a block, called as `mlp(embed_dim, hidden_dim, dtype=,
            param_dtype=, rngs=)`; None for `SwiGLU`. The MLP is called with features
            (batch, seq, embed_dim) and has no state but parameters.
        dtype: The dtype of the computation; None for `param_dtype`.
        param_dtype: The dtype of the parameters.
        remat: Keep only the input of each layer for the backward pass, and compute the
            rest again.
        scan_layers: Stack the layers, see above.
        mesh: A mesh of `make_mesh`. Its devices share the batch, the heads and, along
            "context", the tokens, which then go through `jaxkern.ring_attention` in
            zigzag order. Arguments and results do not depend on it. `get_sharding` says
            where the parameters lie. None, or one device, shares nothing.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: `attention_fn` or `mlp` cannot be called, `rope_theta` is not a
            number, a dtype is not a floating-point dtype, or `rngs` is not an
            `nnx.Rngs`.
        ValueError: A size is not a positive integer; `num_heads` does not divide
            `embed_dim` into parts of even size; `num_kv_heads` does not divide
            `num_heads`; `rope_theta` is not positive and finite; or the mesh cannot
            share the heads evenly, or the tokens with an `attention_fn`.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        model = nn.TransformerLM(
            16,
            8,
            embed_dim=8,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            rngs=nnx.Rngs(0),
        )
        tokens = jnp.array([[1, 2, 3]])
        print(model(tokens).shape)
        print(model.generate(tokens, max_new_tokens=2).shape)
        ```
        ```text
        (1, 3, 16)
        (1, 5)
        ```

    References:
        LLaMA, section 2.2: https://arxiv.org/abs/2302.13971.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        rope_theta: float = 1e4,
        num_kv_heads: int | None = None,
        tie_embeddings: bool = False,
        attention_fn: Callable[..., Any] | None = None,
        mlp: Callable[..., nnx.Module] | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        remat: bool = False,
        scan_layers: bool = True,
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        op = "TransformerLM"
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        vocab_size, context_length, embed_dim, num_layers = check_arguments(
            op,
            None,
            vocab_size=vocab_size,
            context_length=context_length,
            embed_dim=embed_dim,
            num_layers=num_layers,
        )
        hidden_dim, num_heads, kv_heads = check_arguments(
            op, None, hidden_dim=hidden_dim, num_heads=num_heads, num_kv_heads=kv_heads
        )
        dtypes = check_dtypes(op, dtype, param_dtype, rngs)
        _check_heads(embed_dim, num_heads, kv_heads)
        check_number(op, "rope_theta", rope_theta, positive=True)
        mesh = None if getattr(mesh, "size", 0) == 1 else mesh
        if mesh is not None:
            check_mesh(op, mesh, num_heads, kv_heads, attention_fn)
        mlp = partial(SwiGLU, kernel_init=linear_init) if mlp is None else mlp
        check_callable(op, "mlp", mlp)
        make_block = partial(
            TransformerBlock,
            embed_dim,
            num_heads,
            hidden_dim=hidden_dim,
            num_kv_heads=kv_heads,
            rope_theta=rope_theta,
            attention_fn=choose_attention(attention_fn, mesh),
            mlp=mlp,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        init = linear_init if tie_embeddings else embedding_init
        shape, names = (vocab_size, embed_dim), ("vocab", "embed")
        self.embedding = make_kernel(init, rngs, shape, param_dtype, names)
        self.layers: Any = make_layers(make_block, num_layers, scan_layers, rngs)
        self.norm = make_norm(embed_dim, **dtypes)
        self.head = (
            None
            if tie_embeddings
            else make_kernel(linear_init, rngs, shape[::-1], param_dtype, names[::-1])
        )
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.cache_shape = num_layers, kv_heads, embed_dim // num_heads
        self.can_cache = attention_fn is None
        self.dtype = param_dtype if dtype is None else dtype
        self.remat = remat
        self.scan_layers = scan_layers
        self.mesh = mesh

    def __call__(
        self,
        tokens: Integer[Array, "batch seq"],
        positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
        **options: Any,
    ) -> Float[Array, "batch seq vocab"]:
        """Return the logits of each next token, in float32.

        Args:
            tokens: The tokens, from 0 to vocab_size - 1. Outside of `jit` that is
                checked; inside, other tokens give NaN.
            positions: The positions of the tokens; None for 0, 1, 2 and so on.
            options: The options of this call to `attention_fn`.

        Returns:
            The logits.

        Raises:
            TypeError: `tokens` is not an integer array.
            ValueError: `tokens` has another shape, a token is out of range, or the
                sequence is too long.
        """
        return self.logits(self.features(tokens, positions, **options))

    @overload
    def loss(
        self,
        tokens: Array,
        targets: Array,
        *,
        where: Array | None = ...,
        ignore_index: int | None = ...,
        z_loss: Number = ...,
        label_smoothing: Number = ...,
        softcap: float | None = ...,
        return_lse: Literal[False] = ...,
        positions: Array | None = ...,
        chunk: int = ...,
        **options: Any,
    ) -> Array: ...

    @overload
    def loss(
        self,
        tokens: Array,
        targets: Array,
        *,
        where: Array | None = ...,
        ignore_index: int | None = ...,
        z_loss: Number = ...,
        label_smoothing: Number = ...,
        softcap: float | None = ...,
        return_lse: Literal[True],
        positions: Array | None = ...,
        chunk: int = ...,
        **options: Any,
    ) -> tuple[Array, Array]: ...

    @overload
    def loss(
        self,
        tokens: Array,
        targets: Array,
        *,
        where: Array | None = ...,
        ignore_index: int | None = ...,
        z_loss: Number = ...,
        label_smoothing: Number = ...,
        softcap: float | None = ...,
        return_lse: bool,
        positions: Array | None = ...,
        chunk: int = ...,
        **options: Any,
    ) -> Array | tuple[Array, Array]: ...

    def loss(
        self,
        tokens: Integer[Array, "batch seq"],
        targets: Integer[Array, "batch seq"],
        *,
        where: Bool[Array, "batch seq"] | None = None,
        ignore_index: int | None = None,
        z_loss: Number = 0.0,
        label_smoothing: Number = 0.0,
        softcap: float | None = None,
        return_lse: bool = False,
        positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
        chunk: int = 4096,
        **options: Any,
    ) -> Float[Array, ""] | tuple[Float[Array, ""], Float[Array, "batch seq"]]:
        """Return the mean of `jaxkern.cross_entropy` over the tokens that count.

        Args:
            tokens: As in the call.
            targets: The token to predict at each token, usually the next.
            where: False for tokens that do not count in the mean; None counts all.
            ignore_index: Tokens with this target do not count either, as -100 in data
                prepared for PyTorch or for Hugging Face's models.
            z_loss: The factor of the squared log-sum-exp that is added to the loss of
                each token, as PaLM (1e-4), Chameleon and OLMo 2 train.
            label_smoothing: The part of the target's probability that is spread over
                the vocabulary, as models of translation train (0.1).
            softcap: As in `jaxkern.cross_entropy`; Gemma 2 needs 30.0.
            return_lse: Also return the log-sum-exp of each token's logits, which models
                with a z-loss log.
            positions: As in the call.
            chunk: As in `jaxkern.cross_entropy`.
            options: As in the call.

        Returns:
            The mean loss, a scalar; it is 0 if no token counts. With `return_lse` a
            pair of it and the log-sum-exp, which is 0 for tokens that do not count.

        Raises:
            TypeError: An array has another dtype, or an option another type, than in
                the call and in `jaxkern.cross_entropy`.
            ValueError: A shape does not fit, a token or an option is out of range, or
                the sequence is too long.
        """
        op = "TransformerLM.loss"
        self._check_tokens("TransformerLM", "tokens", tokens)
        given = f" for tokens of shape {tokens.shape}"
        check_targets(op, targets, where, ignore_index, tokens.shape, given)
        check_loss_options(op, chunk, z_loss, label_smoothing, softcap, return_lse)
        loss_options: dict[str, Any] = {
            "z_loss": z_loss,
            "label_smoothing": label_smoothing,
        }
        loss_options |= {"softcap": softcap, "chunk": chunk}
        pair = self._mean_loss_and_lse(
            tokens, targets, where, ignore_index, positions, loss_options, options
        )
        return pair if return_lse else pair[0]

    @on_automatic_axes(lambda tokens: (P(), P(*tokens)))
    def _mean_loss_and_lse(
        self, tokens, targets, where, ignore_index, positions, loss_options, options
    ):
        tokens, order, inverse = self._order(tokens)
        features = self._features(tokens, positions, order, options)
        targets, where = read_targets(targets, where, ignore_index)
        targets, where = _take(targets, order), _take(where, order)
        losses, lse = cross_entropy(
            features,
            self._head(),
            targets,
            where=where,
            return_lse=True,
            **loss_options,
        )
        lse = _take(lse, inverse)
        if where is None:
            return losses.mean(), lse
        count = jnp.maximum(where.sum(), 1).astype(losses.dtype)
        return losses.sum() / count, lse

    @on_automatic_axes(lambda tokens: P(*tokens, None))
    def features(
        self,
        tokens: Integer[Array, "batch seq"],
        positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
        **options: Any,
    ) -> Float[Array, "batch seq embed_dim"]:
        """Return the features that the head is applied to.

        Args:
            tokens: As in the call.
            positions: As in the call.
            options: As in the call.

        Returns:
            The features of each token.

        Raises:
            TypeError: As in the call.
            ValueError: As in the call.
        """
        tokens, order, inverse = self._order(tokens)
        return _take(self._features(tokens, positions, order, options), inverse)

    def _features(self, tokens, positions, order, options):
        """Return the features of tokens in the order in which devices share them."""
        if order is not None:
            positions = order if positions is None else positions[..., order]

        def step(x, layer_and_inputs):
            layer, _ = layer_and_inputs
            return layer(x, positions, **options), None

        if self.remat:
            step = jax.checkpoint(step, prevent_cse=not self.scan_layers)
        tokens = self._share(_take(tokens, order), BATCH, "context")
        x = self._share(self._embed(tokens), BATCH, "context", None)
        x, _ = self._run_layers(step, x, None)
        return self.norm(x)

    @on_automatic_axes(lambda features: P(*features[:-1], None))
    def logits(
        self, features: Float[Array, "*batch embed_dim"]
    ) -> Float[Array, "*batch vocab"]:
        """Apply the head to features, in float32.

        Args:
            features: Features as `features` returns them.

        Returns:
            The logits.
        """
        wide = widen(features[:0]).dtype
        return jnp.matmul(features, self._head(), preferred_element_type=wide)

    def make_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache.

        Args:
            batch: The number of sequences.
            capacity: The largest number of tokens of a sequence.

        Returns:
            The cache.

        Raises:
            ValueError: The model has an `attention_fn` of its own, a size is negative
                or not an integer, or `capacity` is 0 or above `context_length`.
        """
        op = "TransformerLM.make_cache"
        if not self.can_cache:
            raise ValueError(
                f"{op}: attention_fn must be None for a cache, got one; "
                "generate(cache=False) needs none"
            )
        batch = check_integer(op, "batch", batch, least=0)
        capacity = check_integer(op, "capacity", capacity)
        _check_length(op, "capacity", capacity, self.context_length)
        layers, kv_heads, dim = self.cache_shape
        shape = layers, batch, capacity, kv_heads, dim
        # Two arrays: one array in both fields could not be donated.
        keys, values = jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)
        return KVCache(keys, values, jnp.zeros((), jnp.int32))

    @on_automatic_axes(_places_with_cache)
    def extend(
        self, tokens: Integer[Array, "batch seq"], cache: KVCache
    ) -> tuple[Float[Array, "batch seq embed_dim"], KVCache]:
        """Return the features of new tokens behind a cache, and the longer cache.

        Args:
            tokens: The new tokens.
            cache: The keys and values of the tokens before them.

        Returns:
            The features of the new tokens, and the cache with their keys and values.

        Raises:
            TypeError: `tokens` is not an integer array.
            ValueError: A token is out of range, or there are more tokens than the
                capacity; both are checked outside of `jit` only.
        """
        op = "TransformerLM.extend"
        self._check_tokens(op, "tokens", tokens)
        check_array(op, "cache.length", cache.length, "integer")
        lengths, seq = known(cache.length), tokens.shape[1]
        if lengths is not None:
            length, most = int(lengths.max(initial=0)), cache.keys.shape[2]
            _check_length(op, "tokens and cache", length + seq, most, "capacity")
        tokens = read_tokens(op, "tokens", tokens, self.vocab_size)
        length = as_int32(cache.length)

        def step(x, layer_and_inputs):
            layer, (keys, values) = layer_and_inputs
            x, *grown = layer.extend(x, keys, values, length)
            return x, grown

        x = self._embed(tokens)
        x, (keys, values) = self._run_layers(step, x, (cache.keys, cache.values))
        return self.norm(x), KVCache(keys, values, length + seq)

    def generate(
        self,
        prompt: Integer[Array, "batch seq"],
        *,
        max_new_tokens: int,
        prompt_lengths: Integer[Array, " batch"] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
        cache: bool = True,
    ) -> Integer[Array, "batch seq+{max_new_tokens}"]:
        """Continue each prompt, and return the prompts with the new tokens in int32.

        It compiles once for each shape of `prompt` and number of new tokens.

        Args:
            prompt: The tokens to continue.
            max_new_tokens: The number of new tokens for each prompt.
            prompt_lengths: The length of each prompt; None if all have the length of
                the array. What follows a shorter prompt in its row is not read and may
                be any integers: the new tokens come right behind the prompt, as if it
                were alone, and zeros fill the row.
            temperature: The number that divides the logits. 0 takes the likeliest
                token.
            top_p: Sample from the fewest tokens whose probabilities sum to at least
                this, and from any that are as likely as the last of them. 1 samples
                from all tokens.
            key: A random key; needed at a temperature above 0, and only there.
            cache: Keep keys and values instead of running the whole sequence for each
                token. The result is the same except for rounding.

        Returns:
            The prompts and the new tokens.

        Raises:
            TypeError: `prompt` or `prompt_lengths` is not an integer array,
                `temperature` or `top_p` is not a number, a key is missing, or there is
                a key at temperature 0.
            ValueError: A shape does not fit; a token, a length, `temperature` or
                `top_p` is out of range; or `cache` is True and the model has an
                `attention_fn`.

        References:
            top_p: https://arxiv.org/abs/1904.09751, section 3.1.
        """
        op = "TransformerLM.generate"
        (count,) = check_arguments(op, None, max_new_tokens=max_new_tokens)
        sampling = check_sampling(op, temperature, top_p, key)
        self._check_tokens(op, "prompt", prompt)
        total = prompt.shape[1] + count
        _check_length(op, "prompt and max_new_tokens", total, self.context_length)
        lengths = prompt_lengths
        if lengths is not None:
            lengths = _read_prompt_lengths(op, lengths, prompt)
        prompt = read_tokens(op, "prompt", prompt, self.vocab_size, lengths)
        return generate(self, prompt, lengths, sampling, count, cache)

    def _run_layers(self, step, x, inputs):
        """Scan `step` over the layers, each with its part of the inputs."""
        if self.scan_layers:
            return lax.scan(step, x, (self.layers, inputs))
        outputs = []
        for i, layer in enumerate(self.layers):
            x, output = step(x, (layer, jax.tree.map(itemgetter(i), inputs)))
            outputs.append(output)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)

    def _order(self, tokens):
        """Return the tokens, the order in which devices share them, and its inverse.

        Both orders are None where the tokens stay in order.
        """
        op = "TransformerLM"
        self._check_tokens(op, "tokens", tokens)
        tokens = read_tokens(op, "tokens", tokens, self.vocab_size)
        if self.mesh is None:
            return tokens, None, None
        check_batch(op, self.mesh, *tokens.shape)
        rings = self.mesh.shape["context"]
        if rings == 1:
            return tokens, None, None
        orders = ring_permutation(tokens.shape[1], rings, "zigzag")
        return tokens, *map(jnp.asarray, orders)

    def _check_tokens(self, op: str, name: str, tokens: Any) -> None:
        check_tokens(op, name, tokens)
        _check_length(op, name, tokens.shape[1], self.context_length)

    def _share(self, x: jax.Array, *axes: Any) -> jax.Array:
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    def _head(self) -> jax.Array:
        head = self.embedding[...].T if self.head is None else self.head[...]
        return head.astype(self.dtype)

    def _embed(self, tokens) -> jax.Array:
        # Without this constraint to whole rows, XLA would gather the gradients of all
        # tokens to split the rows.
        table = self._share(self.embedding[...], P.UNCONSTRAINED, None)
        rows = table.at[tokens]
        x = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return x.astype(self.dtype)


def _take(x: Any, order: jax.Array | None) -> Any:
    """Take tokens (axis 1) in this order; None changes nothing."""
    return x if x is None or order is None else jnp.take(x, order, axis=1)


def _check_heads(embed_dim: int, num_heads: int, kv_heads: int) -> None:
    op = "TransformerLM"
    if embed_dim % num_heads:
        raise ValueError(
            f"{op}: num_heads must divide embed_dim={embed_dim}, got {num_heads}"
        )
    if embed_dim // num_heads % 2:
        raise ValueError(
            f"{op}: embed_dim / num_heads must be even, for rotary positions, "
            f"got {embed_dim} / {num_heads} = {embed_dim // num_heads}"
        )
    if num_heads % kv_heads:
        raise ValueError(
            f"{op}: num_kv_heads must divide num_heads={num_heads}, got {kv_heads}"
        )


def _check_length(
    op: str, name: str, length: int, most: int, limit: str = "context_length"
) -> None:
    if length > most:
        raise ValueError(
            f"{op}: {name} must be at most {limit}={most} tokens, got {length}"
        )


def _read_prompt_lengths(op: str, lengths: Any, prompt: Any) -> jax.Array:
    check_array(op, "prompt_lengths", lengths, "integer")
    given = f" for prompt of shape {prompt.shape}"
    check_shape(op, "prompt_lengths", lengths, prompt.shape[:1], given)
    check_range(op, "prompt_lengths", known(lengths), 1, prompt.shape[1])
    return as_int32(lengths)
