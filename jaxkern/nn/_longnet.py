"""LongNet: an encoder or a decoder of blocks with dilated attention."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from .._attention.dilated import dilated_attention
from .._attention.dilation import Dilation, check_dilation
from .._attention.rotary import log_decays, read_positions, rotary_embedding
from .._core.checks import (
    check_array,
    check_flag,
    check_floating,
    check_number,
    check_shape,
)
from .._core.precision import widen
from .._core.sharding import on_automatic_axes
from ._attention import MultiHeadAttention
from ._common import (
    axis_metadata,
    bind,
    check_arguments,
    check_callable,
    check_dtypes,
    check_input,
    default_attention_kernel_init,
    scale_init,
)

# The five patterns of the paper's experiments, in tokens.
PAPER_DILATION = Dilation((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))


def make_layer_norm(epsilon: float) -> Callable[..., nnx.LayerNorm]:
    """Return what makes a norm.

    Its variance is the mean square of what is left after the mean is subtracted. By
    default flax subtracts two means of squares, which cancel.
    """
    return partial(nnx.LayerNorm, epsilon=epsilon, use_fast_variance=False)


class LongNetBlock(nnx.Module):
    """Self-attention, cross-attention on request, and a GELU feed-forward.

    The arguments are as in `LongNet`. `gain` is the factor of the initial kernels but
    those of query, key and cross-attention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        hidden_dim: int,
        attention_fn: Callable[..., Any],
        is_causal: bool,
        cross_attention: bool,
        norm_epsilon: float,
        gain: float,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = make_layer_norm(norm_epsilon)
        self.attention_norm = norm(embed_dim, **dtypes)
        self.attention = MultiHeadAttention(
            embed_dim,
            num_heads,
            attention_fn=attention_fn,
            is_causal=is_causal,
            sub_layer_norm=True,
            norm=norm,
            gain=gain,
            **dtypes,
        )
        self.cross_norm = norm(embed_dim, **dtypes) if cross_attention else None
        self.cross_attention = (
            MultiHeadAttention(embed_dim, num_heads, **dtypes)
            if cross_attention
            else None
        )
        linear = partial(
            nnx.Linear,
            kernel_init=scale_init(default_attention_kernel_init, gain),
            **dtypes,
        )
        self.mlp_norm = norm(embed_dim, **dtypes)
        self.up = linear(
            embed_dim,
            hidden_dim,
            kernel_metadata=axis_metadata("embed", "mlp"),
            bias_metadata=axis_metadata("mlp"),
        )
        self.hidden_norm = norm(hidden_dim, **dtypes)
        self.down = linear(
            hidden_dim,
            embed_dim,
            kernel_metadata=axis_metadata("mlp", "embed"),
            bias_metadata=axis_metadata("embed"),
        )

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        memory: Float[Array, "batch seq_memory embed"] | None,
        memory_mask: Bool[Array, "batch seq_memory"] | None,
        **options: Any,
    ) -> Float[Array, "batch seq embed"]:
        x = x + self.attention(self.attention_norm(x), **options)
        if self.cross_attention is not None and self.cross_norm is not None:
            mask = None if memory_mask is None else memory_mask[:, None, None]
            x = x + self.cross_attention(self.cross_norm(x), memory, mask=mask)
        hidden = _gelu(self.up(self.mlp_norm(x)))
        return x + self.down(self.hidden_norm(hidden))


class LongNet(nnx.Module):
    r"""LongNet, an encoder or a decoder: blocks of dilated attention over embeddings.

    $$h \leftarrow h + \mathrm{attention}(\mathrm{norm}(h)), \qquad
    h \leftarrow h + W_2\, \mathrm{norm}(\mathrm{gelu}(W_1\, \mathrm{norm}(h)))$$

    A last norm follows the blocks. The attention is `jaxkern.dilated_attention`, with a
    norm of the heads before its last projection, and the GELU is the exact one. The
    norms and the gain of the initial kernels follow Magneto. The call maps x
    (batch, seq, embed_dim) to the same shape; it adds no embeddings. Logical axes for
    `nnx.get_partition_spec` are "embed", "heads", "kv_heads" and "mlp".

    With torchscale's weights it computes what torchscale's `LongNetEncoder` does, or
    its `LongNetDecoder` with `is_causal=True`, for

    - `dilation=Dilation(lengths, rates, head_offsets="blocks")`, and for its gradients
      `stop_gradient_mix=True` in it,
    - `xpos_scale_base=512` where `xpos_rel_pos` was set,
    - lengths that the segments and rates divide: torchscale attends to the zeros that
      it pads with, and to padding, which `key_mask` hides.

    Args:
        embed_dim: The size of the last axis of the input and the output.
        num_heads: The number of attention heads, a divisor of `embed_dim`.
        num_layers: The number of blocks.
        hidden_dim: The hidden size of the feed-forward; None for 4 embed_dim.
        dilation: As in `jaxkern.dilated_attention`. None stands for the paper's, five
            patterns of segments from 2048 to 32768 tokens.
        attention_fn: An attention function in place of dilated attention, without a
            `dilation`. For tokens that devices share, inside `jax.shard_map`:
            `partial(ring_attention, axis_name="seq", dilation=dilation)`.
        is_causal: Let a token see only itself and earlier tokens, as in a decoder.
        xpos_scale_base: The base $c$ of XPOS, which rotates query and key and lets
            logits decay over about $c$ tokens, as in `jaxkern.rotary_embedding`; the
            paper has 512. None adds no positions.
        cross_attention: Let each block also attend to a `memory`, densely, between the
            two parts, as the decoder beside an encoder does.
        norm_epsilon: The epsilon of all norms.
        gain: The factor of the initial kernels but those of query, key and
            cross-attention. None stands for Magneto's $\sqrt{\log 2N}$ of
            $N$ layers, or $\sqrt{\log 3N}$ with `cross_attention`. An encoder of $N$
            layers beside a decoder of $M$ has
            $\sqrt{\tfrac{1}{3} \log 3M \log 2N}$.
        dtype: The dtype of the computation; None promotes the dtypes of input and
            parameters.
        param_dtype: The dtype of the parameters.
        rngs: The random keys for the parameters.

    Raises:
        TypeError: `dilation` is not a `jaxkern.Dilation`, `attention_fn` cannot be
            called, a flag is neither True nor False, a number is not a number, a dtype
            is not a floating-point dtype, or `rngs` is not an `nnx.Rngs`.
        ValueError: A size is not a positive integer or does not divide, a number is not
            positive and finite, there are both `dilation` and `attention_fn`, or heads
            have an odd size with `xpos_scale_base`.

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
        XPOS: https://arxiv.org/abs/2212.10554.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_layers: int,
        hidden_dim: int | None = None,
        dilation: Dilation | None = None,
        attention_fn: Callable[..., Any] | None = None,
        is_causal: bool = False,
        xpos_scale_base: float | None = None,
        cross_attention: bool = False,
        norm_epsilon: float = 1e-5,
        gain: float | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        op = "LongNet"
        attend = _choose_attention(op, attention_fn, dilation)
        embed_dim, num_heads, num_layers = check_arguments(
            op, None, embed_dim=embed_dim, num_heads=num_heads, num_layers=num_layers
        )
        hidden = 4 * embed_dim if hidden_dim is None else hidden_dim
        (hidden,) = check_arguments(op, None, hidden_dim=hidden)
        check_flag(op, is_causal=is_causal, cross_attention=cross_attention)
        if gain is None:
            gain = math.sqrt(math.log((3 if cross_attention else 2) * num_layers))
        numbers = {"norm_epsilon": norm_epsilon, "gain": gain}
        if xpos_scale_base is not None:
            numbers["xpos_scale_base"] = xpos_scale_base
            if embed_dim % (2 * num_heads):
                raise ValueError(
                    f"{op}: embed_dim / num_heads must be an even integer for "
                    f"xpos_scale_base, got {embed_dim} / {num_heads}"
                )
            attend = bind(_attend, attention_fn=attend, scale_base=xpos_scale_base)
        for name, number in numbers.items():
            check_number(op, name, number, positive=True)
        dtypes = check_dtypes(op, dtype, param_dtype, rngs)
        self.blocks = nnx.List(
            LongNetBlock(
                embed_dim,
                num_heads,
                hidden_dim=hidden,
                attention_fn=attend,
                is_causal=is_causal,
                cross_attention=cross_attention,
                norm_epsilon=norm_epsilon,
                gain=gain,
                **dtypes,
            )
            for _ in range(num_layers)
        )
        self.norm = make_layer_norm(norm_epsilon)(embed_dim, **dtypes)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.xpos_scale_base = xpos_scale_base
        self.cross_attention = cross_attention

    @on_automatic_axes(lambda x: x)
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        key_mask: Bool[Array, "batch seq"] | None = None,
        *,
        memory: Float[Array, "batch seq_memory embed"] | None = None,
        memory_mask: Bool[Array, "batch seq_memory"] | None = None,
        positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Return the features of the sequence.

        Args:
            x: The embeddings.
            key_mask: False for padding.
            memory: The features that `cross_attention` attends to, an encoder's.
            memory_mask: False for padding of `memory`.
            positions: The positions of the tokens, for `xpos_scale_base`; None counts
                them from the middle of the sequence. Only differences matter, but
                factors of the decay must fit into the dtype.

        Returns:
            The features of each token.

        Raises:
            TypeError: An array has a wrong dtype.
            ValueError: A shape does not fit, an argument is given or missing against
                `cross_attention` or `xpos_scale_base`, or the sequence is too long for
                the decay.
        """
        op = "LongNet"
        x = check_input(op, x, self.embed_dim)
        check_shape(op, "x", x, ("batch", "seq", self.embed_dim))
        memory = self._check_memory(memory, memory_mask, x.shape[0])
        options: dict[str, Any] = {}
        if key_mask is not None:
            check_array(op, "key_mask", key_mask, "boolean")
            check_shape(op, "key_mask", key_mask, x.shape[:2])
            options["key_mask"] = key_mask
        if self.xpos_scale_base is not None:
            options["positions"] = self._positions(positions, x)
        elif positions is not None:
            raise ValueError(f"{op}: positions must be None without xpos_scale_base")
        for block in self.blocks:
            x = block(x, memory, memory_mask, **options)
        return self.norm(x)

    def _check_memory(self, memory, memory_mask, batch):
        op = "LongNet"
        if not self.cross_attention:
            for name, array in [("memory", memory), ("memory_mask", memory_mask)]:
                if array is not None:
                    raise ValueError(
                        f"{op}: {name} must be None without cross_attention"
                    )
            return None
        if memory is None:
            raise ValueError(
                f"{op}: memory must be given for cross_attention, got None"
            )
        (memory,) = check_floating(op, memory=memory)
        check_shape(op, "memory", memory, (batch, "seq_memory", self.embed_dim))
        if memory_mask is not None:
            check_array(op, "memory_mask", memory_mask, "boolean")
            check_shape(op, "memory_mask", memory_mask, memory.shape[:2])
        return memory

    def _positions(self, positions, x):
        """Return the positions, whose factors fit into the dtype if they are ours."""
        op, seq, base = "LongNet", x.shape[1], self.xpos_scale_base
        if positions is not None:
            return read_positions(op, positions, x.shape[0], seq)
        kernel = self.blocks[0].up.kernel[...]
        dtype = self.norm.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        steepest = -log_decays(self.embed_dim // self.num_heads // 2)[0]
        least = (seq // 2) * steepest / -math.log(jnp.finfo(dtype).tiny)
        if base < least:
            raise ValueError(
                f"{op}: xpos_scale_base must be at least {math.ceil(least)} for {seq} "
                f"tokens in {jnp.dtype(dtype).name}, got {base}"
            )
        return jnp.arange(seq, dtype=jnp.int32) - seq // 2


def _choose_attention(op, attention_fn, dilation) -> Callable[..., Any]:
    """Return the given function, or dilated attention."""
    if attention_fn is not None:
        check_callable(op, "attention_fn", attention_fn)
        if dilation is not None:
            raise ValueError(f"{op}: dilation must be None with an attention_fn")
        return bind(attention_fn)
    dilation = PAPER_DILATION if dilation is None else dilation
    check_dilation(op, dilation)
    return bind(dilated_attention, dilation=dilation)


def _attend(query, key, value, *, attention_fn, scale_base, positions, **options):
    """Rotate query and key with XPOS's decay, and attend."""
    query = rotary_embedding(query, positions, decay=scale_base)
    key = rotary_embedding(key, positions, decay=-scale_base)
    return attention_fn(query, key, value, **options)


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
    """Return the exact GELU, x times the normal distribution function of x."""
    return jax.nn.gelu(x, approximate=False)


# Without this, JAX 0.12 refuses the derivative of `erfc` in `shard_map`: it multiplies
# polynomials whose coefficients lie on all devices by arrays that do not.
@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    wide = widen(x)
    below = 0.5 * lax.erfc(-wide * math.sqrt(0.5))
    slope = below + wide * jnp.exp(-0.5 * wide**2) * (0.5 / math.pi) ** 0.5
    return _gelu(x), slope.astype(x.dtype) * dx
