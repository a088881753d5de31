"""The decoder-only transformer language model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh

from .._attention.rotary import Pairs
from .._attention.rotary_scaling import RotaryScaling
from .._core.activations import ActivationName
from .._core.checks import check_flag
from ._attention import QKNorm, check_heads
from ._causal_attention import choose_attention
from ._common import check_arguments, check_dtypes, make_kernel
from ._decoding import Decoding
from ._layers import make_layers
from ._norms import NormKind, make_norm
from ._sharding import check_mesh
from ._transformer_block import (
    LayerKind,
    NormPlacement,
    TransformerBlock,
    embedding_init,
    linear_init,
)
from ._transformer_loss import Loss
from ._transformer_options import (
    check_capped,
    check_names,
    check_numbers,
    choose_mlp,
    layer_kinds,
)


class TransformerLM(Loss, Decoding):
    r"""A frame for decoder-only language models, by default pre-norm with SwiGLU.

    $$h_0 = E_{\mathrm{tokens}}, \quad
    a_l = h_l + \mathrm{attention}(\mathrm{norm}(h_l)), \quad
    h_{l+1} = a_l + \mathrm{mlp}(\mathrm{norm}(a_l)), \quad
    \mathrm{logits} = \mathrm{norm}(h_L) W_{\mathrm{head}}$$

    The call maps tokens (batch, seq) to logits (batch, seq, vocab_size). The defaults
    are LLaMA's: RMSNorm, in float32, rotary positions and no biases. The arguments from
    `head_dim` to `full_attention_every` say what other families do, and may be mixed.
    Mixtures of experts are not among them. Query and key are rotated by
    `jaxkern.rotary_embedding`. Kernels are drawn from normal distributions of variance
    2 / (d_in + d_out), and embeddings of variance 1, both cut at three standard
    deviations; biases start at 0.

    With `scan_layers` the parameters of the layers are stacked along a first axis and
    run by one `lax.scan`, so compiling takes as long as for one layer, or as for
    `full_attention_every` layers. Parameters and results do not depend on it.

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
        tie_embeddings: Use the embeddings as the head, too, as Gemma and the small
            models of Llama 3.2 and Qwen do. They then start as the head would.
        head_dim: The size of a head; None for embed_dim / num_heads. Mistral Nemo, Qwen
            3 and Gemma have another.
        norm: "rms" for RMSNorm, "rms_plus_one" for RMSNorm by 1 + scale (Gemma),
            "layer" for LayerNorm with scale and bias (StarCoder 2, GPT-NeoX).
        norm_epsilon: The number that is added to the mean square. It is 1e-6 in LLaMA
            1, Qwen, OLMo 2 and Gemma.
        norm_placement: "pre" normalizes the input of attention and MLP, "post" their
            output (OLMo 2), and "both" both, with four norms a block (Gemma 2 and 3).
        qk_norm: Normalize query and key before they are rotated, "head" over the
            features of each head (Qwen 3, Gemma 3) or "embed" over those of all heads
            (OLMo 2); None does not.
        qkv_bias: Add biases to query, key and value (Qwen 2 and 2.5, StarCoder 2).
        out_bias: Add a bias to the output of the attention (StarCoder 2).
        mlp_bias: Add biases in the MLP (StarCoder 2).
        activation: The activation of the MLP, as in `MLP`. "gelu" is the tanh form of
            Gemma.
        gated_mlp: Multiply the activated layer by a second product; False for StarCoder
            2 and GPT-NeoX.
        rope_pairs: As in `jaxkern.rotary_embedding`. The published weights of all
            families named here have "halves".
        rotary_dim: The number of rotated features of a head; None for all. It is 3/4 of
            them in Phi-4-mini and 1/4 in GPT-NeoX.
        rope_scaling: A change of the rotary frequencies for long contexts (Llama 3.1,
            Gemma 3, Phi-3, Qwen).
        local_rope_theta: The `rope_theta` of the layers with a window, without
            `rope_scaling`, where others have none; None for that of the others. Gemma
            3.
        embedding_scale: Multiply the embeddings by it, rounded to `dtype`; sqrt(
            embed_dim) in Gemma.
        attention_scale: The factor of the logits of attention; None for head_dim **
            -0.5. Gemma 2 and 3.
        attention_softcap: Replace each logit s of attention by c tanh(s / c) of this c.
            Gemma 2 has 50. Such attention runs in XLA.
        attention_sinks: Add a logit that is learned and has no value to the softmax of
            each head, so that a head may attend to little (gpt-oss). It starts at 0.
        logit_softcap: The same for the logits of the model. Gemma 2 has 30.
        window: Each query sees the last `window` tokens, its own included; None for all
            (Mistral, Phi-3, Gemma 2 and 3).
        full_attention_every: Layers n - 1, 2 n - 1, ... of this n have no window: 2 for
            Gemma 2, 6 for Gemma 3. None gives a window to all layers.
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
        TypeError: `attention_fn` or `mlp` cannot be called, a number is not a number, a
            flag is neither True nor False, a dtype is not a floating-point dtype, or
            `rngs` is not an `nnx.Rngs`.
        ValueError: A size is not a positive integer; `num_heads` does not divide
            `embed_dim` and there is no `head_dim`; the number of rotated features is
            odd; `num_kv_heads` does not divide `num_heads`; a number is not positive
            and finite; a name is unknown; an option of the default attention or MLP is
            given with another one; there are `attention_sinks` and the `attention_fn`
            has no option `return_lse`; the mesh cannot share the heads evenly; or the
            tokens are shared along "context" and there is an `attention_fn`, a window
            or an `attention_softcap`.

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
        rope_theta: float = 1e4,
        num_kv_heads: int | None = None,
        tie_embeddings: bool = False,
        head_dim: int | None = None,
        norm: NormKind = "rms",
        norm_epsilon: float = 1e-5,
        norm_placement: NormPlacement = "pre",
        qk_norm: QKNorm | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        mlp_bias: bool = False,
        activation: ActivationName = "silu",
        gated_mlp: bool = True,
        rope_pairs: Pairs = "interleaved",
        rotary_dim: int | None = None,
        rope_scaling: RotaryScaling | None = None,
        local_rope_theta: float | None = None,
        embedding_scale: float | None = None,
        attention_scale: float | None = None,
        attention_softcap: float | None = None,
        attention_sinks: bool = False,
        logit_softcap: float | None = None,
        window: int | None = None,
        full_attention_every: int | None = None,
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
        vocab_size, context_length, num_layers, hidden_dim = check_arguments(
            op,
            None,
            vocab_size=vocab_size,
            context_length=context_length,
            num_layers=num_layers,
            hidden_dim=hidden_dim,
        )
        embed_dim, num_heads, kv_heads, dim = check_heads(
            op, embed_dim, num_heads, num_kv_heads, head_dim
        )
        dtypes = check_dtypes(op, dtype, param_dtype, rngs)
        check_numbers(
            op,
            rope_theta=rope_theta,
            norm_epsilon=norm_epsilon,
            local_rope_theta=local_rope_theta,
            embedding_scale=embedding_scale,
            attention_scale=attention_scale,
            attention_softcap=attention_softcap,
            logit_softcap=logit_softcap,
        )
        check_names(norm, norm_placement, qk_norm, rope_pairs, activation)
        check_flag(
            op,
            tie_embeddings=tie_embeddings,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            mlp_bias=mlp_bias,
            gated_mlp=gated_mlp,
            attention_sinks=attention_sinks,
            remat=remat,
            scan_layers=scan_layers,
        )
        self.kinds = layer_kinds(
            LayerKind(window, rope_theta, rope_pairs, rotary_dim, rope_scaling),
            dim,
            local_rope_theta,
            full_attention_every,
        )
        mesh = None if getattr(mesh, "size", 0) == 1 else mesh
        if mesh is not None:
            check_mesh(op, mesh, num_heads, kv_heads, attention_fn)
        capped = {"window": window, "attention_softcap": attention_softcap}
        check_capped(attention_fn, mesh, capped)
        options = {"scale": attention_scale, "softcap": attention_softcap}
        options = {name: x for name, x in options.items() if x is not None}
        attention = choose_attention(attention_fn, mesh, options, attention_sinks)
        make_block = partial(
            TransformerBlock,
            embed_dim,
            num_heads,
            hidden_dim=hidden_dim,
            num_kv_heads=kv_heads,
            head_dim=dim,
            attention=attention,
            attention_sinks=attention_sinks,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            norm=partial(make_norm, kind=norm, epsilon=norm_epsilon),
            norm_placement=norm_placement,
            mlp=choose_mlp(mlp, activation, gated_mlp, mlp_bias),
            dtype=dtype,
            param_dtype=param_dtype,
        )
        init = linear_init if tie_embeddings else embedding_init
        shape, names = (vocab_size, embed_dim), ("vocab", "embed")
        self.embedding = make_kernel(init, rngs, shape, param_dtype, names)
        self.layers = make_layers(make_block, num_layers, scan_layers, rngs)
        self.norm = make_norm(embed_dim, kind=norm, epsilon=norm_epsilon, **dtypes)
        self.head = (
            None
            if tie_embeddings
            else make_kernel(linear_init, rngs, shape[::-1], param_dtype, names[::-1])
        )
        self.vocab_size = vocab_size
        self.context_length = context_length
        windows = [kind.window for kind in self.kinds]
        self.windows = tuple(windows[i % len(windows)] for i in range(num_layers))
        self.cache_shape = kv_heads, dim
        self.embedding_scale = embedding_scale
        self.logit_softcap = logit_softcap
        self.why_no_cache = attention.why_no_cache
        self.why_no_documents = attention.why_no_documents
        self.any_length = attention.any_length
        self.dtype = param_dtype if dtype is None else dtype
        self.remat = remat
        self.scan_layers = scan_layers
        self.mesh = mesh
