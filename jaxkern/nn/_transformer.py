"""The decoder-only transformer language model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Integer, Key, UInt32

from .._attention.ring import ring_permutation
from .._attention.rotary import Pairs, read_positions
from .._attention.rotary_scaling import RotaryScaling
from .._core.activations import ActivationName
from .._core.checks import (
    Number,
    as_int32,
    check_array,
    check_flag,
    check_integer,
    kind_of,
)
from .._core.precision import widen
from .._core.sharding import on_automatic_axes
from .._cross_entropy import (
    check_loss_options,
    check_targets,
    cross_entropy,
    read_targets,
)
from ._attention import QKNorm
from ._cache import KVCache, places_with_cache
from ._common import (
    check_arguments,
    check_dtypes,
    check_range,
    check_tokens,
    known,
    make_kernel,
    read_tokens,
)
from ._generate import check_sampling, generate, read_prompt_lengths
from ._layers import make_layers, run_layers
from ._norms import NormKind, make_norm
from ._sharding import BATCH, check_batch, check_mesh
from ._transformer_block import (
    NormPlacement,
    TransformerBlock,
    choose_attention,
    embedding_init,
    linear_init,
)
from ._transformer_options import (
    ModelOptions,
    TransformerConfig,
    check_capped,
    choose_mlp,
)


class TransformerLM(nnx.Module):
    r"""A frame for decoder-only language models, by default pre-norm with SwiGLU.

    $$h_0 = E_{\mathrm{tokens}}, \quad
    a_l = h_l + \mathrm{attention}(\mathrm{norm}(h_l)), \quad
    h_{l+1} = a_l + \mathrm{mlp}(\mathrm{norm}(a_l)), \quad
    \mathrm{logits} = \mathrm{norm}(h_L) W_{\mathrm{head}}$$

    The call maps tokens (batch, seq) to logits (batch, seq, vocab_size). The defaults
    are LLaMA's: RMSNorm, in float32, rotary positions and no biases. The arguments up
    to `full_attention_every` are the architecture: they are those of
    `TransformerConfig`, which explains them and which the model keeps as `config`.
    Query and key are rotated by `jaxkern.rotary_embedding`. Kernels are drawn from
    normal distributions of variance 2 / (d_in + d_out), and embeddings of variance 1,
    both cut at three standard deviations; biases start at 0.

    With `scan_layers` the parameters of the layers are stacked along a first axis and
    run by one `lax.scan`, so compiling takes as long as for one layer, or as for
    `full_attention_every` layers. Parameters and results do not depend on it.

    Logical axes for `nnx.get_partition_spec` are "vocab", "embed", "heads", "kv_heads",
    "mlp", and "layers" for the axis of stacked layers.

    Args:
        attention_fn: Called as `attention_fn(query, key, value, **options)` with arrays
            (batch, seq, heads, head_dim), and returns one of the query's shape; None
            for `jaxkern.attention`. A function with an option `is_causal` gets True
            for it; any other must be causal itself.
        mlp: Makes the MLP of a block, called as `mlp(embed_dim, hidden_dim, dtype=,
            param_dtype=, rngs=)`; None for `SwiGLU`, or for `MLP` where the arguments
            above ask for it. The MLP is called with features (batch, seq, embed_dim)
            and has no state but parameters.
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
        TypeError: `attention_fn` or `mlp` cannot be called, a flag is neither True nor
            False, a dtype is not a floating-point dtype, `rngs` is not an `nnx.Rngs`,
            or `TransformerConfig` raises it.
        ValueError: `TransformerConfig` raises it; an option of the default attention or
            MLP is given with another one; the mesh cannot share the heads evenly; or
            the tokens are shared along "context" and there is an `attention_fn`, a
            window or an `attention_softcap`.

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
        other = nn.TransformerLM.from_config(model.config, rngs=nnx.Rngs(1))
        print(other.config == model.config)
        ```
        ```text
        (1, 3, 16)
        (1, 5)
        True
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
        rope_theta: float = TransformerConfig.rope_theta,
        num_kv_heads: int | None = TransformerConfig.num_kv_heads,
        tie_embeddings: bool = TransformerConfig.tie_embeddings,
        head_dim: int | None = TransformerConfig.head_dim,
        norm: NormKind = TransformerConfig.norm,
        norm_epsilon: float = TransformerConfig.norm_epsilon,
        norm_placement: NormPlacement = TransformerConfig.norm_placement,
        qk_norm: QKNorm | None = TransformerConfig.qk_norm,
        qkv_bias: bool = TransformerConfig.qkv_bias,
        out_bias: bool = TransformerConfig.out_bias,
        mlp_bias: bool = TransformerConfig.mlp_bias,
        activation: ActivationName = TransformerConfig.activation,
        gated_mlp: bool = TransformerConfig.gated_mlp,
        rope_pairs: Pairs = TransformerConfig.rope_pairs,
        rotary_dim: int | None = TransformerConfig.rotary_dim,
        rope_scaling: RotaryScaling | None = TransformerConfig.rope_scaling,
        local_rope_theta: float | None = TransformerConfig.local_rope_theta,
        embedding_scale: float | None = TransformerConfig.embedding_scale,
        attention_scale: float | None = TransformerConfig.attention_scale,
        attention_softcap: float | None = TransformerConfig.attention_softcap,
        logit_softcap: float | None = TransformerConfig.logit_softcap,
        window: int | None = TransformerConfig.window,
        full_attention_every: int | None = TransformerConfig.full_attention_every,
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
        # Each field of the config is an argument of the same name.
        config = TransformerConfig.from_arguments(locals())
        dtypes = check_dtypes(op, dtype, param_dtype, rngs)
        check_flag(op, remat=remat, scan_layers=scan_layers)
        num_heads, kv_heads, dim = config.heads
        mesh = None if getattr(mesh, "size", 0) == 1 else mesh
        if mesh is not None:
            check_mesh(op, mesh, num_heads, kv_heads, attention_fn)
        check_capped(attention_fn, mesh, config)
        options = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        options = {name: x for name, x in options.items() if x is not None}
        norm_of = partial(make_norm, kind=config.norm, epsilon=config.norm_epsilon)
        make_block = partial(
            TransformerBlock,
            config.embed_dim,
            num_heads,
            hidden_dim=config.hidden_dim,
            num_kv_heads=kv_heads,
            head_dim=dim,
            attention_fn=choose_attention(attention_fn, mesh, options),
            attention_options=options,
            qk_norm=config.qk_norm,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            norm=norm_of,
            norm_placement=config.norm_placement,
            mlp=choose_mlp(mlp, config),
            dtype=dtype,
            param_dtype=param_dtype,
        )
        init = linear_init if config.tie_embeddings else embedding_init
        shape, names = (config.vocab_size, config.embed_dim), ("vocab", "embed")
        self.embedding = make_kernel(init, rngs, shape, param_dtype, names)
        count = config.num_layers
        self.layers: Any = make_layers(make_block, count, scan_layers, rngs)
        self.norm = norm_of(config.embed_dim, **dtypes)
        self.head = (
            None
            if config.tie_embeddings
            else make_kernel(linear_init, rngs, shape[::-1], param_dtype, names[::-1])
        )
        self.config = config
        self.kinds = config.layer_kinds
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.cache_shape = count, kv_heads, dim
        self.can_cache = attention_fn is None
        self.dtype = param_dtype if dtype is None else dtype
        self.remat = remat
        self.scan_layers = scan_layers
        self.mesh = mesh

    @classmethod
    def from_config(
        cls,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        **options: Unpack[ModelOptions],
    ) -> "TransformerLM":
        """Make a model of an architecture that is given as data.

        Args:
            config: The architecture, such as another model's `config`.
            rngs: The random keys for the parameters.
            options: The arguments of the constructor that are no architecture, from
                `attention_fn` to `mesh`.

        Returns:
            The model.

        Raises:
            TypeError: `config` is not a `TransformerConfig`, or as in the constructor.
            ValueError: As in the constructor.
        """
        if not isinstance(config, TransformerConfig):
            kind = kind_of(config)
            raise TypeError(
                "TransformerLM.from_config: config must be a TransformerConfig, got "
                f"{kind}"
            )
        return cls(**vars(config), **options, rngs=rngs)

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
            softcap: As in `jaxkern.cross_entropy`; None for the model's
                `logit_softcap`.
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
            ValueError: A shape does not fit, an option is out of range, or the sequence
                is too long; or a token or a target that counts is out of range, which
                is checked outside of `jit` only.
        """
        op = "TransformerLM.loss"
        self._check_tokens(op, "tokens", tokens)
        given = f" for tokens of shape {tokens.shape}"
        check_targets(op, targets, where, ignore_index, tokens.shape, given)
        check_loss_options(op, chunk, z_loss, label_smoothing, softcap, return_lse)
        _check_counted(op, targets, where, ignore_index, self.vocab_size)
        loss_options: dict[str, Any] = {
            "z_loss": z_loss,
            "label_smoothing": label_smoothing,
        }
        softcap = self.config.logit_softcap if softcap is None else softcap
        loss_options |= {"softcap": softcap, "chunk": chunk}
        pair = self._mean_loss_and_lse(
            tokens, targets, where, ignore_index, positions, loss_options, options
        )
        return pair if return_lse else pair[0]

    @on_automatic_axes(lambda tokens: (P(), P(*tokens)))
    def _mean_loss_and_lse(
        self, tokens, targets, where, ignore_index, positions, loss_options, options
    ):
        op = "TransformerLM.loss"
        tokens, order, inverse = self._order(op, tokens)
        features = self._features(op, tokens, positions, order, options)
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
        op = "TransformerLM"
        self._check_tokens(op, "tokens", tokens)
        tokens, order, inverse = self._order(op, tokens)
        return _take(self._features(op, tokens, positions, order, options), inverse)

    def _features(self, op, tokens, positions, order, options):
        """Return the features of tokens in the order in which devices share them."""
        if positions is not None:
            positions = read_positions(op, positions, *tokens.shape)
        if order is not None:
            positions = order if positions is None else positions[..., order]

        def step(kind, x, layer_and_inputs):
            layer, _ = layer_and_inputs
            return layer(x, positions, kind=kind, **options), None

        if self.remat:
            in_scan = self.scan_layers and len(self.kinds) == 1
            step = jax.checkpoint(step, prevent_cse=not in_scan, static_argnums=0)
        tokens = self._share(_take(tokens, order), BATCH, "context")
        x = self._share(self._embed(tokens), BATCH, "context", None)
        x, _ = run_layers(self.layers, self.kinds, step, x, None)
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
        logits = jnp.matmul(features, self._head(), preferred_element_type=wide)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

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

    @on_automatic_axes(places_with_cache)
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

        def step(kind, x, layer_and_inputs):
            layer, (keys, values) = layer_and_inputs
            x, *grown = layer.extend(x, keys, values, length, kind)
            return x, grown

        x = self._embed(tokens)
        x, (keys, values) = run_layers(
            self.layers, self.kinds, step, x, (cache.keys, cache.values)
        )
        return self.norm(x), KVCache(keys, values, length + seq)

    def generate(
        self,
        prompt: Integer[Array, "batch seq"],
        *,
        max_new_tokens: int,
        prompt_lengths: Integer[Array, " batch"] | None = None,
        temperature: float | Float[Array, " batch"] = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] = (),
        key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
        cache: bool = True,
    ) -> Integer[Array, "batch seq+{max_new_tokens}"]:
        """Continue each prompt, and return the prompts with the new tokens in int32.

        It compiles once for each shape of `prompt`, number of new tokens and `top_k`.
        The options of sampling apply in the order in which they are listed here, but
        for `repetition_penalty`, which comes first.

        Args:
            prompt: The tokens to continue.
            max_new_tokens: The number of new tokens for each prompt.
            prompt_lengths: The length of each prompt; None if all have the length of
                the array. What follows a shorter prompt in its row is not read and may
                be any integers: the new tokens come right behind the prompt, as if it
                were alone, and zeros fill the row.
            temperature: The number that divides the logits, or one for each prompt. 0
                takes the likeliest token, which `top_k`, `top_p` and `min_p` keep.
            top_k: Sample from this many likeliest tokens, and from any that are as
                likely as the last of them. None samples from all.
            top_p: Sample from the fewest tokens whose probabilities sum to at least
                this, and from any that are as likely as the last of them. 1 samples
                from all tokens.
            min_p: Sample from tokens at least this times as likely as the likeliest.
                0 samples from all.
            repetition_penalty: Divide positive logits of tokens that are in the prompt
                or were generated by it, and multiply negative ones by it, at any
                temperature. 1 changes nothing.
            stop_tokens: Tokens that end a sequence. Zeros follow them, and when all
                sequences have ended, no more is computed.
            key: A random key; needed at a temperature above 0 and for an array of
                temperatures, and only there.
            cache: Keep keys and values instead of running the whole sequence for each
                token. The result is the same except for rounding.

        Returns:
            The prompts and the new tokens.

        Raises:
            TypeError: `prompt` or `prompt_lengths` is not an integer array, a number is
                not a number, `stop_tokens` is not a sequence, a key is missing, there
                is a key at temperature 0, or `cache` is neither True nor False.
            ValueError: A shape does not fit; a token, a length or a number is out of
                range; or `cache` is True and the model has an `attention_fn`.

        References:
            top_k: https://arxiv.org/abs/1805.04833, section 5.3.
            top_p: https://arxiv.org/abs/1904.09751, section 3.1.
            min_p: https://arxiv.org/abs/2407.01082, section 3.2.
            repetition_penalty: CTRL, section 4.1, https://arxiv.org/abs/1909.05858.
                Negative logits are multiplied, as Hugging Face's code does.
        """
        op = "TransformerLM.generate"
        (count,) = check_arguments(op, None, max_new_tokens=max_new_tokens)
        check_flag(op, cache=cache)
        self._check_tokens(op, "prompt", prompt)
        sampling, top_k = check_sampling(
            op,
            prompt.shape[0],
            self.vocab_size,
            key,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_tokens=stop_tokens,
        )
        total = prompt.shape[1] + count
        _check_length(op, "prompt and max_new_tokens", total, self.context_length)
        lengths = prompt_lengths
        if lengths is not None:
            lengths = read_prompt_lengths(op, lengths, prompt)
        prompt = read_tokens(op, "prompt", prompt, self.vocab_size, lengths)
        return generate(self, prompt, lengths, sampling, top_k, count, cache)

    def _order(self, op, tokens):
        """Return the tokens, the order in which devices share them, and its inverse.

        Both orders are None where the tokens stay in order.
        """
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
        x = x.astype(self.dtype)
        scale = self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)


def _take(x: Any, order: jax.Array | None) -> Any:
    """Take tokens (axis 1) in this order; None changes nothing."""
    return x if x is None or order is None else jnp.take(x, order, axis=1)


def _check_counted(
    op: str, targets: Any, where: Any, ignore_index: int | None, vocab_size: int
) -> None:
    """Check that targets that count are in the vocabulary, if their values are known.

    Inside `jit` the loss of other targets is NaN.
    """
    values, counts = known(targets), None if where is None else known(where)
    if values is None or (where is not None and counts is None):
        return
    if counts is not None:
        values = values[counts]
    if ignore_index is not None:
        values = values[values != ignore_index]
    check_range(op, "targets", values, 0, vocab_size - 1)


def _check_length(
    op: str, name: str, length: int, most: int, limit: str = "context_length"
) -> None:
    if length > most:
        raise ValueError(
            f"{op}: {name} must be at most {limit}={most} tokens, got {length}"
        )
