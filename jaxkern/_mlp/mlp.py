"""Gated and low-rank MLPs."""

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._core.activations import ACTIVATIONS
from .._core.checks import (
    check_batched,
    check_floating,
    check_pair,
    check_shape,
    raise_unknown,
)
from .._core.dispatch import Implementation, check_implementation, choose, run
from .._core.precision import matmul, relu2, widen
from .._sparsity.packed import Packed24
from .._sparsity.select import GROUP, KEPT, sparsify_2_4
from . import feature_wise, thresholds
from .packed_mlp import is_packed, packed_low_rank_relu2

Sparsity = Literal["2:4", "2:4-soft", "2:4-static"]
Gradient = Literal["exact", "straight_through", "feature_wise"]
Pair = tuple[jax.Array, jax.Array]

# The backward computes the activations again from the matmuls' results: that is cheap,
# and keeping their float32 intermediates costs up to 16 bytes an element.
_recompute = partial(jax.checkpoint, prevent_cse=False)


@_recompute
def _silu_gate(
    gate: Float[Array, "*batch hidden"], up: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch hidden"]:
    silu = ACTIVATIONS["silu"].value(widen(gate))
    return (silu * widen(up)).astype(gate.dtype)


@partial(_recompute, static_argnums=(1, 2))
def _sparse_relu2(
    z: Float[Array, "*batch hidden"],
    sparsity: Sparsity | None,
    gradient: Literal["exact", "straight_through"] | None,
) -> Float[Array, "*batch hidden"]:
    hidden = relu2(z)
    match sparsity:
        case "2:4":
            return sparsify_2_4(hidden, method="top2", gradient=gradient)
        case "2:4-soft":
            return sparsify_2_4(hidden, method="soft", gradient=gradient)
        case _:
            return hidden


def _drop_static(up: Pair, down: Pair) -> tuple[Pair, Pair]:
    """The factors without the features at positions 2 and 3 of each group."""

    # The order of the features does not matter, so strided slices do: no gather.
    def kept(w: jax.Array, axis: int) -> jax.Array:
        parts = [
            lax.slice_in_dim(w, min(i, w.shape[axis]), None, GROUP, axis)
            for i in range(KEPT)
        ]
        return jnp.concatenate(parts, axis)

    return (up[0], kept(up[1], axis=1)), (kept(down[0], axis=0), down[1])


def _check_pairs(op: str, x: Any, **pairs: Pair) -> tuple[Any, ...]:
    """`x` and the pairs, as JAX's arrays."""
    arrays = {"x": x}
    for name, pair in pairs.items():
        check_pair(op, name, pair)
        arrays |= {f"{name}[{i}]": factor for i, factor in enumerate(pair)}
    x, *factors = check_floating(op, **arrays)
    return x, *zip(factors[::2], factors[1::2], strict=True)


def _check_low_rank(
    op: str,
    name: str,
    pair: Pair,
    d_in: int | str,
    d_out: int | str,
    because: str = "",
) -> None:
    check_shape(op, f"{name}[0]", pair[0], (d_in, "rank"), because)
    rank = pair[0].shape[1]
    check_shape(op, f"{name}[1]", pair[1], (rank, d_out))
    n_in, n_out = pair[0].shape[0], pair[1].shape[1]
    if rank * (n_in + n_out) >= n_in * n_out:
        warnings.warn(
            f"{op}: rank of {name} should be below d_in d_out / (d_in + d_out) = "
            f"{n_in * n_out / (n_in + n_out):.1f}, from which on the full-rank weight "
            f"is no larger, got {rank}",
            stacklevel=4,
        )


def _given(x: jax.Array) -> str:
    return f" for x of shape {x.shape}"


def check_sparsity(op: str, sparsity: object) -> None:
    valid = (None, *get_args(Sparsity))
    if sparsity not in valid:
        raise_unknown(op, "sparsity", sparsity, valid)


# What `gradient` may be, and why no more.
GRADIENTS = {
    None: ((None,), ", which drops nothing"),
    "2:4": ((None, *get_args(Gradient)), ""),
    "2:4-soft": ((None, "exact", "straight_through"), ""),
    "2:4-static": ((None, "exact"), ", which never computes what it drops"),
}


def check_gradient(op: str, sparsity: Sparsity | None, gradient: object) -> None:
    valid, reason = GRADIENTS[sparsity]
    if gradient not in (None, *get_args(Gradient)):
        raise_unknown(op, "gradient", gradient, (None, *get_args(Gradient)))
    if gradient not in valid:
        raise ValueError(
            f"{op}: gradient must be {' or '.join(map(repr, valid))} for "
            f"sparsity={sparsity!r}{reason}, got {gradient!r}"
        )


def swiglu(
    x: Float[Array, "*batch d_in"],
    w_gate: Float[Array, "d_in hidden"],
    w_up: Float[Array, "d_in hidden"],
    w_down: Float[Array, "hidden d_out"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""The gated MLP of LLaMA, without biases.

    $$y = (\mathrm{silu}(x W_{gate}) \odot (x W_{up})) W_{down}$$

    Matmuls accumulate in float32, the activation is computed in float32, and each
    result is rounded once to the dtype of `x`. Saved for the backward: the arguments,
    the two products with `x` and the input of the last matmul, in the dtype of `x`.

    "mosaic_gpu", on an H100 or H200, in bfloat16 and float16: the gate is the epilogue
    of both matmuls before it, which go to memory for the backward alone, and its
    derivative that of the matmul with $W_{down}^T$. Tokens that are no multiple of 8
    and sizes that are none of 64 are padded by copies. Its silu uses the hardware's
    approximate tanh. Gradients are of reverse mode and first order only: `jvp` and
    `grad` of `grad` need "xla". Under `vmap` samples run one by one, and gradients of
    weights that they share are made for each and then added: put samples in leading
    axes of `x` instead.

    None picks the kernels where all sizes are multiples of 64, with `d_in` and `d_out`
    up to 1024 from 512 tokens on, and up to 4096 from 8192 tokens on. On an H200, 8192
    tokens of (4096, 11008, 4096) took 9906 us of the device, forward and backward, and
    XLA 10432 in an earlier run; the rest is predicted.

    Raises:
        TypeError: an argument is no floating-point array, or the dtypes differ.
        ValueError: the shapes do not fit, or `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.

    References:
        GLU Variants Improve Transformer, eq. 6: https://arxiv.org/abs/2002.05202.
    """
    op = "swiglu"
    check_implementation(op, implementation)
    x, w_gate, w_up, w_down = check_floating(
        op, x=x, w_gate=w_gate, w_up=w_up, w_down=w_down
    )
    check_batched(op, "x", x)
    check_shape(op, "w_gate", w_gate, (x.shape[-1], "hidden"), _given(x))
    check_shape(op, "w_up", w_up, w_gate.shape)
    check_shape(op, "w_down", w_down, (w_gate.shape[1], "d_out"))
    *batch, d_in = x.shape
    hidden_size, d_out = w_down.shape
    faster = thresholds.kernel_is_faster(
        op, math.prod(batch), (d_in, d_out), hidden_size
    )
    arrays, unsupported = (x, w_gate, w_up, w_down), partial(_unsupported, x)
    return run(
        choose(op, implementation, arrays, unsupported, faster),
        *arrays,
        implementation=implementation,
        xla=_swiglu,
        kernel=_swiglu_in_kernels,
    )


# Compiled as one, so that a call outside of `jax.jit` compiles nothing anew.
@jax.jit
def _swiglu(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    hidden = _silu_gate(matmul(x, w_gate), matmul(x, w_up))
    return matmul(hidden, w_down)


def _swiglu_in_kernels(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> jax.Array:
    # Mosaic is imported on first use of a kernel.
    from .hopper import fused

    y = fused.gated_mlp(_rows(x), w_gate, w_up, w_down)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _rows(x: jax.Array) -> jax.Array:
    """All batch axes of `x` in one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _unsupported(
    x: jax.Array,
    ranks: Sequence[int] = (),
    sparsity: Sparsity | None = None,
    gradient: Gradient | None = None,
) -> str | None:
    # Mosaic is imported on first use of a kernel.
    from .hopper import fused

    return fused.unsupported(x, ranks, sparsity, gradient)


def low_rank_matmul(
    x: Float[Array, "*batch d_in"],
    weight: tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""Multiply by a weight that is kept as two thin factors.

    $$y = (x W_{in}) W_{out}$$

    The product $W_{in} W_{out}$ is never formed: a row costs
    2 rank (d_in + d_out) FLOPs instead of 2 d_in d_out.

    Raises:
        TypeError: an argument is no floating-point array, `weight` is no pair, or the
            dtypes differ.
        ValueError: the shapes do not fit, or `implementation` is unknown.
        NotImplementedError: `implementation` is "mosaic_gpu", which has no kernel yet.

    Warns:
        UserWarning: the rank saves nothing over a full-rank weight.

    References:
        LoRA, section 4.1, without the frozen weight: https://arxiv.org/abs/2106.09685.
    """
    op = "low_rank_matmul"
    check_implementation(op, implementation)
    x, weight = _check_pairs(op, x, weight=weight)
    check_batched(op, "x", x)
    _check_low_rank(op, "weight", weight, x.shape[-1], "d_out", _given(x))
    if implementation == "mosaic_gpu":
        raise NotImplementedError(
            f"{op}: implementation must be None or 'xla', got 'mosaic_gpu', for which "
            "this op has no kernel"
        )
    return _low_rank_matmul(x, weight)


@jax.jit
def _low_rank_matmul(x: jax.Array, weight: Pair) -> jax.Array:
    return matmul(matmul(x, weight[0]), weight[1])


def low_rank_swiglu(
    x: Float[Array, "*batch d_in"],
    gate: tuple[Float[Array, "d_in rank_gate"], Float[Array, "rank_gate hidden"]],
    up: tuple[Float[Array, "d_in rank_up"], Float[Array, "rank_up hidden"]],
    down: tuple[Float[Array, "hidden rank_down"], Float[Array, "rank_down d_out"]],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""`swiglu` with three low-rank weights, each a pair (w_in, w_out).

    $$y = (\mathrm{silu}(x G_{in} G_{out}) \odot (x U_{in} U_{out})) D_{in} D_{out}$$

    Precision and what is saved for the backward are those of `swiglu`.

    "mosaic_gpu", on an H100 or H200, in bfloat16 and float16, for gate and up of the
    same rank: one matmul for $G_{in}$ and $U_{in}$, which every call joins by a copy
    (of 7B, 16 MB), a kernel or two, and the last matmul. The gate is the epilogue of
    both matmuls before it, which go to memory for the backward alone, and its
    derivative that of the matmul with $D_{in}^T$. Or, with equal ranks up to 32, the
    kernel is the gated one of `flash_mlp`, and hidden features never reach memory.
    Tokens that are no multiple of 8, and ranks and hidden sizes that are none of 64,
    are padded by copies. What `swiglu` says of silu, `jvp`, `grad` of `grad` and, but
    for `flash_mlp`'s, of `vmap` holds too.

    None picks the kernels with ranks up to 512 from 512 tokens on and up to 1024 from
    4096 tokens on, and where something is padded from 8192 tokens on. They were
    measured to be faster on an H200, forward and backward, at 16384 tokens of ranks
    256, 512 and 1024; the rest is predicted.

    Raises:
        TypeError: an argument is no floating-point array, a weight is no pair, or the
            dtypes differ.
        ValueError: the shapes do not fit, or `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.

    Warns:
        UserWarning: a rank saves nothing over a full-rank weight.
    """
    op = "low_rank_swiglu"
    check_implementation(op, implementation)
    x, gate, up, down = _check_pairs(op, x, gate=gate, up=up, down=down)
    check_batched(op, "x", x)
    _check_low_rank(op, "gate", gate, x.shape[-1], "hidden", _given(x))
    hidden_size = gate[1].shape[1]
    _check_low_rank(op, "up", up, x.shape[-1], hidden_size, _given(x))
    _check_low_rank(op, "down", down, hidden_size, "d_out")
    *batch, d_in = x.shape
    ranks = gate[1].shape[0], up[1].shape[0], down[0].shape[1]
    faster = thresholds.kernel_is_faster(op, math.prod(batch), ranks, hidden_size)
    arrays, unsupported = (x, *gate, *up, *down), partial(_unsupported, x, ranks)
    return run(
        choose(op, implementation, arrays, unsupported, faster),
        x,
        gate,
        up,
        down,
        implementation=implementation,
        xla=_low_rank_swiglu,
        kernel=_low_rank_swiglu_in_kernels,
    )


@jax.jit
def _low_rank_swiglu(x: jax.Array, gate: Pair, up: Pair, down: Pair) -> jax.Array:
    hidden = _silu_gate(_low_rank_matmul(x, gate), _low_rank_matmul(x, up))
    return _low_rank_matmul(hidden, down)


def _low_rank_swiglu_in_kernels(
    x: jax.Array, gate: Pair, up: Pair, down: Pair
) -> jax.Array:
    # Both first factors in one matmul.
    core = matmul(_rows(x), jnp.concatenate([gate[0], up[0]], axis=1))
    core = _gated_in_kernels(core, gate[1], up[1], down[0])
    return matmul(core, down[1]).reshape(*x.shape[:-1], down[1].shape[1])


def _gated_in_kernels(
    core: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """Apply what lies between the first and the last factors.

    `core` has the two of shape (tokens, rank) side by side.
    """
    from .hopper import flash, fused

    match thresholds.dense_kernel((gate.shape[0], down.shape[1])):
        case "flash_mlp":
            return flash.mlp(core[None], (gate[None], up[None]), down[None], "silu")[0]
        case "matmul":
            return fused.gated_mlp(core, gate, up, down)


def low_rank_relu2(
    x: Float[Array, "*batch d_in"],
    up: tuple[Float[Array, "d_in rank_up"], Float[Array, "rank_up hidden"]]
    | tuple[Packed24, Packed24],
    down: tuple[Float[Array, "hidden rank_down"], Float[Array, "rank_down d_out"]]
    | tuple[Packed24, Packed24],
    *,
    sparsity: Sparsity | None = None,
    gradient: Gradient | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d_out"]:
    r"""The ungated ReLU² MLP with two low-rank weights, each a pair (w_in, w_out).

    $$y = \mathcal{S}(\max(x U_{in} U_{out}, 0)^2) D_{in} D_{out}$$

    $\mathcal{S}$, by `sparsity`, acts on the hidden features of each token:

    - None: the identity;
    - "2:4": `sparsify_2_4` with "top2". In XLA the matmul that follows stays dense;
    - "2:4-soft": `sparsify_2_4` with "soft", $\beta$ per token;
    - "2:4-static": the features 2 and 3 of each 4 are never computed, and have zero
      gradients. The kept halves of `up[1]` and `down[0]` are copied in every call, and
      saved for the backward.

    `gradient` says how the backward passes $\mathcal{S}$. None is "straight_through"
    for "2:4-soft" and else "exact". With $z = x U_{in} U_{out}$, $a = \max(z, 0)^2$ and
    the mask $M$ of what is kept:

    - "exact": the derivative, for "2:4" $da = M \odot da'$;
    - "straight_through", for "2:4" and "2:4-soft": $da = da'$. Its bias in $dz = 2\,da
      \odot \max(z, 0)$ is, for "2:4", $2 (1 - M) \odot da' \odot \max(z, 0)$: none in
      groups of at most two positive entries;
    - "feature_wise", for "2:4": the training recipe of arXiv 2503.16672. Straight
      through, and for $h = \mathcal{S}(a) D_{in}$ the inner factors' gradients are

        $$dD_{in} = \mathcal{F}(a)^T dh, \quad dU_{out} = (x U_{in})^T \mathcal{F}(dz)$$

        so that hidden features enter every matmul but $dz\,U_{out}^T$ 2:4-sparse along
        the axis it sums over. $\mathcal{F}$ keeps, feature by feature, the two largest
        of each four tokens, and all tokens of the 5 % of the features (rounded up) of
        which $a$ has the fewest zeros. In place of the paper's fixed permutation, the
        tokens of a group are a quarter of all tokens apart, counted over the batch axes
        in order. The result is that of "2:4". Emulated by dense matmuls, it saves no
        time. It has no `jvp`, and under `shard_map` and `vmap` each part chooses among
        its own tokens and features.

    For inference the weights themselves can be 2:4-sparse along the axis they sum over:
    then each of the four factors, (in, out), is given as `pack_2_4` of its transpose,
    9/16 of the bytes in 16 bits, and `sparsity` and `gradient` must be None.

    Where the hidden features are sharded by hand, each shard begins a group anew: give
    it a multiple of four, and "2:4-soft" whole tokens.

    Precision is that of `swiglu`; in float16, $a$ overflows from $z = 256$ on. Saved
    for the backward: the arguments, and in the dtype of `x` the results of all matmuls
    but the last and, except for "feature_wise", the input of the third.

    "mosaic_gpu", on an H100 or H200, in bfloat16 and float16, is a kernel or two
    between the first and the last matmul:

    - the activation is the epilogue of the matmul before it, and its derivative that of
      the matmul with $D_{in}^T$: $2 \sqrt a$ of the $a$ that is saved. In float16 both
      are 0 for $z$ below $2^{-12}$, where $a$ underflows;
    - or, without 2:4 or with "2:4-static", `flash_mlp`'s, with equal ranks up to 32:
      the hidden features never reach memory;
    - "2:4" and "2:4-soft" are selected in that epilogue too, from $a$ in 16 bits, go to
      memory packed, in 9/16 of the bytes, and on to sparse tensor cores, whose order of
      positions is verified on an H200. For an exact gradient nothing else is kept;
      "2:4-soft" has the straight-through one only. Its $\beta$, of float32 sums, scales
      the third product, which is rounded before and after.

    Tokens that are no multiple of 8, and ranks and hidden sizes that are none of 64,
    are padded by copies. What `swiglu` says of `jvp`, of `grad` of `grad` and, but for
    `flash_mlp`'s, of `vmap` holds too.

    None picks the kernels from so many tokens on (where something is padded): 512
    (2048), for "2:4-static" 512 (4096), for "2:4-soft" 1024, and for "2:4" 2048 (4096)
    with ranks up to 1024 and 8192 with larger ones, which straight-through gradients
    leave to XLA. They were measured to be faster on an H200, forward and backward, at
    16384 tokens: dense at ranks 256, 512 and 1024, the others at rank 1024. The rest is
    predicted.

    With packed factors "xla" unpacks them in every call and multiplies densely.
    "mosaic_gpu" makes all four products transposed, so that the weight is the sparse
    operand of the tensor cores: half the multiply-adds. Values are read in half a
    weight's bytes; positions are put in the kernel's order in every call, another
    fourth. Tokens that are no multiple of 64 are padded by copies, and so are factors
    and what they make where ranks and sizes are no multiples of 128. Its gradients are
    those of "xla", which computes the forward again, of reverse mode and first order
    only. Under `vmap` samples run one by one: put them in leading axes of `x`. None
    picks this kernel from 4096 tokens on. On an H200, 16384 tokens of 7B took 1477 us
    of the device, and the same MLP of dense weights 1751 by this op's kernels and 2097
    by XLA. XLA's form with packed factors was not timed; fewer tokens are predicted.

    ```python
    >>> import jax.numpy as jnp, jaxkern
    >>> x = jnp.ones((3, 8))
    >>> up = jnp.ones((8, 4)), jnp.ones((4, 12))
    >>> down = jnp.ones((12, 4)), jnp.ones((4, 8))
    >>> print(jaxkern.low_rank_relu2(x, up, down)[0, 0])
    49152.0
    >>> up, down = (tuple(jaxkern.pack_2_4(w.T) for w in pair) for pair in (up, down))
    >>> print(jaxkern.low_rank_relu2(x, up, down)[0, 0])
    768.0

    ```

    Raises:
        TypeError: an argument is no floating-point array, a weight is no pair, some
            factors are packed and others not, or the dtypes differ.
        ValueError: the shapes do not fit, `sparsity`, `gradient` or `implementation` is
            unknown, `gradient` does not go with `sparsity`, or one of these is given
            with packed factors.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.

    Warns:
        UserWarning: a rank saves nothing over a full-rank weight.

    References:
        ReLU²: Primer, https://arxiv.org/abs/2109.08668; 2:4 on it:
        https://arxiv.org/abs/2503.16672; 2:4 in weights:
        https://arxiv.org/abs/2104.08378.
    """
    op = "low_rank_relu2"
    check_implementation(op, implementation)
    check_sparsity(op, sparsity)
    check_gradient(op, sparsity, gradient)
    if is_packed(up, down):
        for name, option in [("sparsity", sparsity), ("gradient", gradient)]:
            if option is not None:
                raise ValueError(
                    f"{op}: {name} must be None with Packed24 factors, since one "
                    f"operand of a matmul can be sparse, got {option!r}"
                )
        return packed_low_rank_relu2(op, x, up, down, implementation)
    return _dense_low_rank_relu2(op, x, up, down, sparsity, gradient, implementation)


def _dense_low_rank_relu2(
    op: str,
    x: jax.Array,
    up: Any,
    down: Any,
    sparsity: Sparsity | None,
    gradient: Gradient | None,
    implementation: Implementation | None,
) -> jax.Array:
    """`low_rank_relu2` of factors that are arrays."""
    x, up, down = _check_pairs(op, x, up=up, down=down)
    check_batched(op, "x", x)
    _check_low_rank(op, "up", up, x.shape[-1], "hidden", _given(x))
    _check_low_rank(op, "down", down, up[1].shape[1], "d_out")
    if sparsity == "2:4-static":
        up, down = _drop_static(up, down)
    *batch, d_in = x.shape
    hidden_size, ranks = up[1].shape[1], (up[1].shape[0], down[0].shape[1])
    name = sparsity or op
    if (sparsity, gradient) == ("2:4", "straight_through"):
        name = "2:4 straight_through"
    faster = thresholds.kernel_is_faster(name, math.prod(batch), ranks, hidden_size)
    arrays = x, *up, *down
    unsupported = partial(_unsupported, x, ranks, sparsity, gradient)
    options = {"sparsity": sparsity, "gradient": gradient}
    return run(
        choose(op, implementation, arrays, unsupported, faster),
        x,
        up,
        down,
        implementation=implementation,
        xla=partial(_low_rank_relu2, **options),
        kernel=partial(_low_rank_relu2_in_kernels, **options),
    )


@partial(jax.jit, static_argnames=("sparsity", "gradient"))
def _low_rank_relu2(
    x: jax.Array,
    up: Pair,
    down: Pair,
    sparsity: Sparsity | None,
    gradient: Gradient | None,
) -> jax.Array:
    if gradient == "feature_wise":
        core = feature_wise.relu2_between(matmul(x, up[0]), up[1], down[0])
        return matmul(core, down[1])
    hidden = _sparse_relu2(_low_rank_matmul(x, up), sparsity, gradient)
    return _low_rank_matmul(hidden, down)


def _low_rank_relu2_in_kernels(
    x: jax.Array,
    up: Pair,
    down: Pair,
    sparsity: Sparsity | None,
    gradient: Gradient | None,
) -> jax.Array:
    core = matmul(_rows(x), up[0])
    core = _relu2_in_kernels(core, up[1], down[0], sparsity, gradient)
    return matmul(core, down[1]).reshape(*x.shape[:-1], down[1].shape[1])


def _relu2_in_kernels(
    core: jax.Array,
    up: jax.Array,
    down: jax.Array,
    sparsity: Sparsity | None,
    gradient: Gradient | None,
) -> jax.Array:
    """What is between the first and the last factor."""
    from .hopper import flash, fused, sparse

    match sparsity:
        case "2:4":
            exact = gradient != "straight_through"
            return sparse.sparse_relu2_mlp(core, up, down, shrink=False, exact=exact)
        case "2:4-soft":
            return sparse.sparse_relu2_mlp(core, up, down, shrink=True, exact=False)
        case None | "2:4-static":
            pass
    # What the static form drops is gone from the factors.
    match thresholds.dense_kernel((up.shape[0], down.shape[1])):
        case "flash_mlp":
            return flash.mlp(core[None], (up[None],), down[None], "relu2")[0]
        case "matmul":
            return fused.relu2_mlp(core, up, down)
