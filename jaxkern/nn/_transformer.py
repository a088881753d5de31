"""The decoder-only transformer language model."""

from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh

from .._attention.rotary import Pairs
from .._attention.rotary_scaling import RotaryScaling
from .._core.activations import ActivationName
from .._core.checks import check_flag, kind_of
from ._attention_checks import QKNorm
from ._causal_attention import choose_attention
from ._common import bind, check_dtypes, make_kernel
from ._decoding import Decoding
from ._layers import make_layers
from ._norms import NormKind, make_norm
from ._sharding import check_mesh
from ._transformer_block import (
    NormPlacement,
    TransformerBlock,
    embedding_init,
    linear_init,
)
from ._transformer_loss import Loss
from ._transformer_options import (
    ModelOptions,
    TransformerConfig,
    check_capped,
    choose_mlp,
)


class TransformerLM(Loss, Decoding):
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
            for it; any other must be causal itself. With options `is_causal` and `mask`
            (True = attend, as in `jax.nn.dot_product_attention`) it decodes as fast as
            `jaxkern.attention`. Without them the cache calls it with zeros for earlier
            queries, on which its result must not depend.
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
            MLP is given with another one; there are `attention_sinks` and the
            `attention_fn` has no option `return_lse`; the mesh cannot share the heads
            evenly; or the tokens are shared along "context" and there is an
            `attention_fn`, a window or an `attention_softcap`.

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
        attention_sinks: gpt-oss, section 2.2, https://arxiv.org/abs/2508.10925.
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
        attention_sinks: bool = TransformerConfig.attention_sinks,
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
        sinks = config.attention_sinks
        attention = choose_attention(attention_fn, mesh, options, sinks)
        norm_of = partial(make_norm, kind=config.norm, epsilon=config.norm_epsilon)
        make_block = partial(
            TransformerBlock,
            config.embed_dim,
            num_heads,
            hidden_dim=config.hidden_dim,
            num_kv_heads=kv_heads,
            head_dim=dim,
            attention=attention,
            attention_sinks=config.attention_sinks,
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
        self.layers = make_layers(make_block, count, scan_layers, rngs)
        self.norm = norm_of(config.embed_dim, **dtypes)
        self.head = (
            None
            if config.tie_embeddings
            else make_kernel(linear_init, rngs, shape[::-1], param_dtype, names[::-1])
        )
        self.config = config
        self.attention_fn = None if attention_fn is None else bind(attention_fn)
        self.kinds = config.layer_kinds
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        windows = [kind.window for kind in self.kinds]
        self.windows = tuple(windows[i % len(windows)] for i in range(count))
        self.cache_shape = kv_heads, dim
        self.why_no_cache = attention.why_no_cache
        self.why_no_documents = attention.why_no_documents
        self.any_length = attention.any_length
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
