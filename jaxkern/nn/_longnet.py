"""The LongNet encoder."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from .._attention.dilated import dilated_attention
from .._attention.dilation import Dilation, check_dilation
from .._core.sharding import on_automatic_axes
from ._attention import MultiHeadAttention
from ._common import (
    axis_metadata,
    bind,
    check_arguments,
    check_dtypes,
    check_input,
    default_attention_kernel_init,
    scale_init,
)

# The five patterns of the paper's experiments, in tokens.
PAPER_DILATION = Dilation((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))


class LongNetBlock(nnx.Module):
    """Dilated attention and a GELU feed-forward, each with Magneto's two norms.

    The arguments are as in `LongNet`. `gain` is the factor of all initial kernels but
    the kernels of query and key.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        dilation: Dilation,
        is_causal: bool,
        gain: float,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(embed_dim, **dtypes)
        self.attention = MultiHeadAttention(
            embed_dim,
            num_heads,
            attention_fn=bind(
                dilated_attention,
                dilation=dilation,
            ),
            is_causal=is_causal,
            sub_layer_norm=True,
            gain=gain,
            **dtypes,
        )
        linear = partial(
            nnx.Linear,
            kernel_init=scale_init(default_attention_kernel_init, gain),
            **dtypes,
        )
        self.mlp_norm = nnx.LayerNorm(embed_dim, **dtypes)
        self.up = linear(
            embed_dim,
            hidden_dim,
            kernel_metadata=axis_metadata("embed", "mlp"),
            bias_metadata=axis_metadata("mlp"),
        )
        self.hidden_norm = nnx.LayerNorm(hidden_dim, **dtypes)
        self.down = linear(
            hidden_dim,
            embed_dim,
            kernel_metadata=axis_metadata("mlp", "embed"),
            bias_metadata=axis_metadata("embed"),
        )

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        key_mask: Bool[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        x = x + self.attention(self.attention_norm(x), key_mask=key_mask)
        hidden = jax.nn.gelu(self.up(self.mlp_norm(x)))
        return x + self.down(self.hidden_norm(hidden))


class LongNet(nnx.Module):
    r"""The encoder of LongNet: blocks of dilated attention over embeddings.

    $$h \leftarrow h + \mathrm{attention}(\mathrm{norm}(h)), \qquad
    h \leftarrow h + W_2\, \mathrm{norm}(\mathrm{gelu}(W_1\, \mathrm{norm}(h)))$$

    A last norm follows the blocks. The attention is `jaxkern.dilated_attention`. The
    norms and the gain of the initial kernels, sqrt(log(2 num_layers)), follow Magneto.
    The call maps x (batch, seq, embed_dim) to the same shape. It adds no embeddings and
    no positions (the paper has XPOS inside the attention). Logical axes for
    `nnx.get_partition_spec` are "embed", "heads", "kv_heads" and "mlp".

    Args:
        embed_dim: The size of the last axis of the input and the output.
        num_heads: The number of attention heads, a divisor of `embed_dim`.
        num_layers: The number of blocks.
        hidden_dim: The hidden size of the feed-forward; None for 4 embed_dim.
        dilation: As in `jaxkern.dilated_attention`. The default is the paper's, five
            patterns of segments from 2048 to 32768 tokens.
        is_causal: As in `jaxkern.dilated_attention`.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: `dilation` is not a `jaxkern.Dilation`, a dtype is not a
            floating-point dtype, or `rngs` is not an `nnx.Rngs`.
        ValueError: A size is not a positive integer or does not divide.

    Examples:
        ```python
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import Dilation, nn

        dilation = Dilation((4, 8), (1, 2))
        model = nn.LongNet(8, 2, num_layers=1, dilation=dilation, rngs=nnx.Rngs(0))

        @nnx.jit
        def encode(model, x):
            return model(x)

        print(encode(model, jnp.ones((2, 8, 8))).shape)
        ```
        ```text
        (2, 8, 8)
        ```

    References:
        LongNet: https://arxiv.org/abs/2307.02486.
        Norms and gain: Magneto, section 3, https://arxiv.org/abs/2210.06423.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_layers: int,
        hidden_dim: int | None = None,
        dilation: Dilation = PAPER_DILATION,
        is_causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        op = "LongNet"
        check_dilation(op, dilation)
        embed_dim, num_layers = check_arguments(
            op, None, embed_dim=embed_dim, num_layers=num_layers
        )
        hidden = 4 * embed_dim if hidden_dim is None else hidden_dim
        (hidden,) = check_arguments(op, None, hidden_dim=hidden)
        dtypes = check_dtypes(op, dtype, param_dtype, rngs)
        self.blocks = nnx.List(
            LongNetBlock(
                embed_dim,
                num_heads,
                hidden_dim=hidden,
                dilation=dilation,
                is_causal=is_causal,
                gain=math.sqrt(math.log(2 * num_layers)),
                **dtypes,
            )
            for _ in range(num_layers)
        )
        self.norm = nnx.LayerNorm(embed_dim, **dtypes)
        self.embed_dim = embed_dim

    @on_automatic_axes(lambda x: x)
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        key_mask: Bool[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Return the encoded sequence.

        Args:
            x: The embeddings.
            key_mask: False for padding.

        Returns:
            The features of each token.
        """
        x = check_input("LongNet", x, self.embed_dim)
        for block in self.blocks:
            x = block(x, key_mask)
        return self.norm(x)
