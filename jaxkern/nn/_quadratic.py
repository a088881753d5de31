"""The transformer without softmax, whose MLPs each sample may mask."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from .._attention.quadratic import quadratic_attention
from .._attention.rotary import Pairs, rotary_embedding
from .._core.dispatch import Implementation
from .._core.sharding import on_automatic_axes
from .._masked.bernoulli import straight_through
from .._masked.estimators import Estimator
from .._masked.forms import Method
from ._bilinear import Bilinear, MaskedBilinear
from ._common import (
    axis_metadata,
    check_arguments,
    check_dtypes,
    check_tokens,
    read_tokens,
)
from ._masked import mask_sparsity

default_transformer_init = nnx.initializers.normal(0.02)
# Added to the mean square in RMSNorm: the spacing of float32 at 1.
EPSILON = float(jnp.finfo(jnp.float32).eps)


class QuadraticAttention(nnx.Module):
    """Causal `quadratic_attention` of rotated heads, between projections.

    Query and key share one RMSNorm over the features of a head, before the rotation.
    The projection back has no bias. The arguments are those of `QuadraticTransformer`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        rotary_pairs: Pairs,
        dtype: Dtype | None,
        param_dtype: Dtype,
        kernel_init: Initializer,
        rngs: nnx.Rngs,
    ):
        dim = embed_dim // num_heads
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def project() -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                embed_dim,
                (num_heads, dim),
                kernel_init=kernel_init,
                kernel_metadata=axis_metadata("embed", "heads", None),
                bias_metadata=axis_metadata("heads", None),
                **dtypes,
            )

        self.query, self.key, self.value = project(), project(), project()
        self.out = nnx.LinearGeneral(
            (num_heads, dim),
            embed_dim,
            axis=(-2, -1),
            use_bias=False,
            kernel_init=kernel_init,
            kernel_metadata=axis_metadata("heads", None, "embed"),
            **dtypes,
        )
        self.norm = nnx.RMSNorm(dim, epsilon=EPSILON, **dtypes)
        self.rotary_pairs: Pairs = rotary_pairs

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        key_mask: Bool[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        query, key = (
            rotary_embedding(self.norm(project(x)), pairs=self.rotary_pairs)
            for project in (self.query, self.key)
        )
        value = self.value(x)
        return self.out(
            quadratic_attention(query, key, value, is_causal=True, key_mask=key_mask)
        )


class QuadraticBlock(nnx.Module):
    """Attention and a bilinear MLP, each added to its input, without other norms.

    `masks` has the options of a `MaskedBilinear`; None makes a `Bilinear`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        rotary_pairs: Pairs,
        masks: dict[str, Any] | None,
        **options: Any,
    ):
        self.attention = QuadraticAttention(
            embed_dim, num_heads, rotary_pairs=rotary_pairs, **options
        )
        self.mlp: Bilinear | MaskedBilinear = (
            Bilinear(embed_dim, hidden_dim, **options)
            if masks is None
            else MaskedBilinear(embed_dim, hidden_dim, **masks, **options)
        )

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        key_mask: Bool[Array, "batch seq"] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "batch seq embed"]:
        x = x + self.attention(x, key_mask)
        options = {"key": key} if isinstance(self.mlp, MaskedBilinear) else {}
        return x + self.mlp(x, **options)


class QuadraticTransformer(nnx.Module):
    r"""A language model of squared attention and bilinear MLPs, each masked or not.

    $$h \leftarrow h + \mathrm{attn}(h), \qquad h \leftarrow h + \mathrm{mlp}(h), \qquad
      \mathrm{logits} = h E^T$$

    with the embedding $E$ of the tokens. Attention is causal and sums the values by
    $(q \cdot k / \mathrm{dim})^2$, without softmax. Query and key share an RMSNorm
    before their rotary embedding; there are no other norms. The MLP of a masked layer
    is a `MaskedBilinear`, of the others a `Bilinear`. The call maps tokens (batch, seq)
    to logits (batch, seq, vocab_size).

    The published checkpoints fit `QuadraticTransformer(4096, 512, num_heads=8,
    num_layers=3, masked_layers=[0], rngs=rngs)`, which has 14,698,688 parameters.

    The weights are the same with masks and without, so a trained model becomes masked
    by `nnx.update(masked, nnx.state(trained, nnx.Param))`. See `MaskLogits` for
    training only the masks. With all logits above 0, as they start, `straight_through`
    masks nothing.

    Logical axes for `nnx.get_partition_spec` are "vocab", "embed", "heads", "mlp", and
    "batch" for masks.

    Args:
        vocab_size: The number of different tokens.
        embed_dim: The number of features of a token.
        num_heads: The number of attention heads; each must have an even number of
            features, so `embed_dim` must be a multiple of twice this.
        num_layers: The number of blocks.
        hidden_dim: The hidden size of the MLPs; None for 4 embed_dim.
        masked_layers: The indices, from 0, of the blocks whose MLP has masks.
        num_masks: The number of samples that have masks of their own; None for masks
            that all samples of a batch share.
        estimator: As in `jaxkern.masked_bilinear`.
        method: As in `jaxkern.masked_bilinear`.
        initial_logit: The first logit of every masked weight.
        rotary_pairs: The `pairs` of `jaxkern.rotary_embedding`, which says which
            trained weights need "mismatched".
        dtype: The dtype of the computation; None is the dtype of the parameters.
        param_dtype: The dtype of the parameters and the logits.
        kernel_init: The initializer of kernels and embedding.
        implementation: That of the masked MLPs, as in `jaxkern.masked_bilinear`.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: A dtype is not a floating-point dtype, or `rngs` is not an
            `nnx.Rngs`.
        ValueError: A size is not a positive integer or does not divide, an index in
            `masked_layers` is not a layer, or there is `num_masks` without masked
            layers.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import nn

        model = nn.QuadraticTransformer(
            16, 8, num_heads=2, num_layers=1, masked_layers=[0], rngs=nnx.Rngs(0)
        )

        @nnx.jit
        def predict(model, tokens):
            return model(tokens)

        print(predict(model, jnp.zeros((2, 3), jnp.int32)).shape)
        print(model.sparsity()["total"])
        ```
        ```text
        (2, 3, 16)
        0.0
        ```

    References:
        The MLPs: Bilinear MLPs, https://arxiv.org/abs/2410.08417.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        *,
        num_heads: int,
        num_layers: int,
        hidden_dim: int | None = None,
        masked_layers: Sequence[int] = (),
        num_masks: int | None = None,
        estimator: Estimator = straight_through,
        method: Method | None = None,
        initial_logit: float = 1.0,
        rotary_pairs: Pairs = "interleaved",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_transformer_init,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        op = "QuadraticTransformer"
        vocab_size, embed_dim, num_heads, num_layers = check_arguments(
            op,
            implementation,
            vocab_size=vocab_size,
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_layers=num_layers,
        )
        hidden = 4 * embed_dim if hidden_dim is None else hidden_dim
        (hidden,) = check_arguments(op, None, hidden_dim=hidden)
        _check_options(masked_layers, num_masks, embed_dim, num_heads, num_layers)
        dtypes = check_dtypes(op, dtype, param_dtype, rngs)
        masks = {
            "num_masks": num_masks,
            "estimator": estimator,
            "method": method,
            "initial_logit": initial_logit,
            "implementation": implementation,
        }
        self.embed = nnx.Embed(
            vocab_size,
            embed_dim,
            embedding_init=kernel_init,
            embedding_metadata=axis_metadata("vocab", "embed"),
            **dtypes,
        )
        self.blocks = nnx.List(
            QuadraticBlock(
                embed_dim,
                num_heads,
                hidden_dim=hidden,
                rotary_pairs=rotary_pairs,
                masks=masks if layer in masked_layers else None,
                kernel_init=kernel_init,
                **dtypes,
            )
            for layer in range(num_layers)
        )
        self.vocab_size = vocab_size
        self.masked_layers = tuple(sorted(map(int, set(masked_layers))))

    @on_automatic_axes(lambda ids: P(*ids, None))
    def __call__(
        self,
        ids: Integer[Array, "batch seq"],
        *,
        key_mask: Bool[Array, "batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Return the logits of the next token, at every token.

        Args:
            ids: The tokens, from 0 to vocab_size - 1. Outside of `jit` this is checked.
            key_mask: False for padding.
            key: A random key for estimators that draw.

        Returns:
            The logits.

        Raises:
            TypeError: `ids` is not an integer array.
            ValueError: A shape does not fit, an id is out of range, there are more
                samples than masks, or there is a key but no masked layer.
        """
        op = "QuadraticTransformer"
        check_tokens(op, "ids", ids)
        ids = read_tokens(op, "ids", ids, self.vocab_size)
        if key is not None and not self.masked_layers:
            raise ValueError(f"{op}: key must be None without masked layers, got one")
        layers = self.masked_layers
        keys: dict[int, jax.Array] = {}
        if key is not None:
            drawn = jax.random.split(key, len(layers))
            keys = dict(zip(layers, drawn, strict=True))
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, key_mask, keys.get(i))
        return self.embed.attend(x)

    def sparsity(self) -> dict[str, Float[Array, "*masks"]]:
        """Return the `mask_sparsity` of this module."""
        return mask_sparsity(self)


def _check_options(
    masked_layers: Sequence[int],
    num_masks: int | None,
    embed_dim: int,
    num_heads: int,
    num_layers: int,
) -> None:
    op = "QuadraticTransformer"
    if embed_dim % (2 * num_heads):
        raise ValueError(
            f"{op}: embed_dim must be a multiple of 2 num_heads = {2 * num_heads}, "
            f"got {embed_dim}"
        )
    outside = [i for i in masked_layers if i not in range(num_layers)]
    if outside:
        raise ValueError(
            f"{op}: masked_layers must be in [0, {num_layers}), got {outside[0]}"
        )
    if num_masks is not None and not masked_layers:
        raise ValueError(
            f"{op}: num_masks must be None without masked_layers, got {num_masks}"
        )
