"""The loss of a language model, computed without storing all its logits."""

from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from ._core.checks import (
    Number,
    as_int32,
    check_array,
    check_batched,
    check_flag,
    check_floating,
    check_integer,
    check_number,
    check_shape,
)
from ._core.precision import widen, widen_range
from ._core.sharding import on_automatic_axes, vary_alike


@overload
def cross_entropy(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    where: Array | None = ...,
    ignore_index: int | None = ...,
    z_loss: Number = ...,
    label_smoothing: Number = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
    chunk: int = ...,
) -> Array: ...


@overload
def cross_entropy(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    where: Array | None = ...,
    ignore_index: int | None = ...,
    z_loss: Number = ...,
    label_smoothing: Number = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
    chunk: int = ...,
) -> tuple[Array, Array]: ...


@overload
def cross_entropy(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    where: Array | None = ...,
    ignore_index: int | None = ...,
    z_loss: Number = ...,
    label_smoothing: Number = ...,
    softcap: float | None = ...,
    return_lse: bool,
    chunk: int = ...,
) -> Array | tuple[Array, Array]: ...


def cross_entropy(
    hidden: Float[Array, "*batch embed_dim"],
    head: Float[Array, "embed_dim vocab"],
    targets: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    ignore_index: int | None = None,
    z_loss: Number = 0.0,
    label_smoothing: Number = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    chunk: int = 4096,
) -> Float[Array, "*batch"] | tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    r"""Return the cross-entropy of each token's target, in chunks of the vocabulary.

    $$\ell = L - (1 - \alpha)\, z_{\mathrm{target}}
    - \frac{\alpha}{\mathrm{vocab}} \sum_v z_v + \beta L^2, \qquad
    L = \log \sum_v e^{z_v}, \quad z = h\,W_{\mathrm{head}}$$

    Here $\alpha$ is `label_smoothing` and $\beta$ is `z_loss`. Both are 0 by default,
    which leaves $\ell = L - z_{\mathrm{target}}$.

    Logits exist for at most `chunk` columns of the vocabulary at a time. The backward
    pass computes them again, so memory holds tokens x `chunk` logits instead of tokens
    x vocab; it also holds one copy of `head`. With every option the gradient is exact.
    There is no forward-mode derivative (`jax.jvp`).

    Logits and sums are float32, or float64 if the arguments are. For bfloat16 the
    gradient of the logits is rounded to bfloat16 before it is multiplied. For float16
    it stays float32, since it would underflow.

    Args:
        hidden: The features of each token, with any leading axes.
        head: The matrix that maps features to logits.
        targets: The index in the vocabulary that each token should predict.
        where: False for tokens that do not count: their loss is 0 and they get no
            gradient, whatever their target and features are. None counts all tokens.
        ignore_index: Tokens with this target do not count either. It may be any
            integer, inside the vocabulary or not. Data prepared for PyTorch or for
            Hugging Face's models has -100.
        z_loss: The factor $\beta$ of the squared log-sum-exp, a Python number or an
            array. It keeps logits from drifting: PaLM trains with 1e-4, and Chameleon
            and OLMo 2 also have it.
        label_smoothing: The part $\alpha$ of the probability, from 0 to 1, that is
            spread evenly over the vocabulary, a Python number or an array. Models of
            translation such as the original Transformer train with 0.1.
        softcap: Replace each logit $z$ by $c \tanh(z / c)$ for this $c$, a positive
            Python number. Gemma 2 needs 30.0. None leaves logits as they are.
        return_lse: Also return $L$. Models that train with a z-loss log it.
        chunk: The largest number of columns of `head` to compute at once.

    Returns:
        The loss of each token, in float32 (or float64). It is NaN for a target that is
        not in the vocabulary. With `return_lse` a pair $(\ell, L)$, where $L$ has the
        dtype of the loss, its own exact gradient, and 0 for tokens that do not count.

    Raises:
        TypeError: `hidden` or `head` is not a floating-point array, their dtypes
            differ, `targets` is not an integer array, `where` is not boolean, `z_loss`,
            `label_smoothing` or `softcap` is not one number, or `return_lse` is neither
            True nor False.
        ValueError: The shapes do not fit, `chunk` is not a positive integer,
            `ignore_index` is not an integer, or a number is out of its range.

    Examples:
        Logits that are all equal give log(vocab):

        ```python
        import jax.numpy as jnp
        import jaxkern

        hidden, head = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
        targets = jnp.zeros((2, 3), jnp.int32)
        loss = jaxkern.cross_entropy(hidden, head, targets, chunk=4)
        print(loss.shape, loss.mean())
        ```
        ```text
        (2, 3) 2.0794415
        ```

        The last target does not count, and the others' losses have a z-loss:

        ```python
        loss, lse = jaxkern.cross_entropy(
            hidden[0],
            head,
            jnp.array([0, 1, -100]),
            ignore_index=-100,
            z_loss=1e-4,
            return_lse=True,
        )
        print(loss - 1e-4 * lse**2)
        ```
        ```text
        [2.0794415 2.0794415 0.       ]
        ```

    References:
        Recomputed logits: Liger Kernel, section 3.2, https://arxiv.org/abs/2410.10989.
        Chunks of columns: Cut Your Losses, https://arxiv.org/abs/2411.09009.
        `z_loss`: PaLM, section 5, https://arxiv.org/abs/2204.02311.
        `label_smoothing`: Inception v2, section 7, https://arxiv.org/abs/1512.00567.
        `softcap`: Gemma 2, section 2, https://arxiv.org/abs/2408.00118.
    """
    op = "cross_entropy"
    hidden, head = check_floating(op, hidden=hidden, head=head)
    check_batched(op, "hidden", hidden)
    given = f" for hidden of shape {hidden.shape}"
    check_shape(op, "head", head, (hidden.shape[-1], "vocab"), given)
    check_targets(op, targets, where, ignore_index, hidden.shape[:-1], given)
    check_loss_options(op, chunk, z_loss, label_smoothing, softcap, return_lse)
    chunks = -(-head.shape[1] // int(chunk))
    cap = None if softcap is None else float(softcap)
    pair = _losses_and_lse(
        hidden, head, targets, where, ignore_index, z_loss, label_smoothing, cap, chunks
    )
    return pair if return_lse else pair[0]


def check_targets(
    op: str,
    targets: Any,
    where: Any,
    ignore_index: Any,
    shape: tuple[int, ...],
    because: str,
) -> None:
    """Check the arrays that say what tokens should predict, and which of them count."""
    check_array(op, "targets", targets, "integer")
    check_shape(op, "targets", targets, shape, because)
    if where is not None:
        check_array(op, "where", where, "boolean")
        check_shape(op, "where", where, shape, because)
    if ignore_index is not None:
        check_integer(op, "ignore_index", ignore_index, least=None)


def check_loss_options(
    op: str,
    chunk: Any,
    z_loss: Any,
    label_smoothing: Any,
    softcap: Any,
    return_lse: Any,
) -> None:
    """Check the options of the loss that say nothing of single tokens."""
    check_integer(op, "chunk", chunk)
    check_number(op, "z_loss", z_loss, least=0.0, traced=True)
    check_number(
        op, "label_smoothing", label_smoothing, least=0.0, most=1.0, traced=True
    )
    if softcap is not None:
        check_number(op, "softcap", softcap, positive=True)
    check_flag(op, return_lse=return_lse)


def read_targets(
    targets: Any, where: Any, ignore_index: int | None
) -> tuple[Integer[Array, "*batch"], Bool[Array, "*batch"] | None]:
    """Return the targets in int32, and which tokens count; None for all of them."""
    limits = jnp.iinfo(targets.dtype)
    if ignore_index is not None and limits.min <= ignore_index <= limits.max:
        # The comparison comes first, since `as_int32` makes large integers equal.
        counts = jnp.asarray(targets != np.asarray(ignore_index, targets.dtype))
        where = counts if where is None else where & counts
    return as_int32(targets), where


@on_automatic_axes(lambda hidden: PartitionSpec(*hidden[:-1]))
def _losses_and_lse(
    hidden, head, targets, where, ignore_index, z_loss, label_smoothing, softcap, chunks
):
    targets, where = read_targets(targets, where, ignore_index)
    if where is not None:
        # Without this, features that are NaN would make the gradient of `head` NaN,
        # although they are multiplied by 0.
        hidden = jnp.where(where[..., None], hidden, 0)
        targets = jnp.where(where, targets, 0)
    smooth = not _is_zero(label_smoothing)
    arrays = vary_alike(hidden, head, targets)
    lse, target, mean = _statistics(*arrays, chunks, softcap, smooth)
    losses = lse - target
    if smooth:
        losses += jnp.asarray(label_smoothing, lse.dtype) * (target - mean)
    if not _is_zero(z_loss):
        losses += jnp.asarray(z_loss, lse.dtype) * lse * lse
    if where is None:
        return losses, lse
    return jnp.where(where, losses, 0), jnp.where(where, lse, 0)


def _is_zero(number):
    """Whether a number is 0 when traced; an array may be anything."""
    return not isinstance(number, jax.Array | np.ndarray) and number == 0


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _statistics(hidden, head, targets, chunks, softcap, smooth):
    """Return the logits' log-sum-exp, the target's logit and the logits' mean.

    Every loss is made of these three. The mean is None unless `smooth`.
    """
    return _forward(hidden, head, targets, chunks, softcap, smooth)[0]


# `jit` here, and at the gradient, so that eager calls compile once.
@partial(jax.jit, static_argnames=("chunks", "softcap", "smooth"))
def _forward(hidden, head, targets, chunks, softcap, smooth):
    vocab = head.shape[1]

    def add(carry, numbered):
        top, total, target_logit, mean = carry
        logits, _, ids = _logits(hidden, numbered, chunks, softcap)
        candidates = _without_filling(logits, ids, vocab)
        higher = jnp.maximum(top, candidates.max(-1))
        weights = jnp.exp(candidates - higher[..., None])
        total = total * jnp.exp(top - higher) + weights.sum(-1)
        hit = ids == targets[..., None].astype(ids.dtype)
        target_logit += jnp.where(hit, candidates, 0).sum(-1)
        if smooth:
            # The logits of columns that fill up the last chunk are 0 here.
            mean += logits.sum(-1) / vocab
        return (higher, total, target_logit, mean), None

    zero = jnp.zeros_like(hidden[..., 0], widen(hidden[:0]).dtype)
    inside = (targets >= 0) & (targets < vocab)
    start = zero + _below(zero), zero, jnp.where(inside, zero, jnp.nan), zero
    carry, _ = lax.scan(add, vary_alike(*start, like=(hidden,)), _split(head, chunks))
    top, total, target_logit, mean = carry
    lse = top + jnp.log(total)
    results = lse, target_logit, mean if smooth else None
    return results, (hidden, head, targets, lse)


def _backward(chunks, softcap, smooth, saved, cotangents):
    return *_gradients(*saved, *cotangents, chunks, softcap, smooth), None


@partial(jax.jit, static_argnames=("chunks", "softcap", "smooth"))
def _gradients(
    hidden, head, targets, lse, d_lse, d_target, d_mean, chunks, softcap, smooth
):
    vocab = head.shape[1]
    axes = tuple(range(targets.ndim))

    def add(d_hidden, numbered):
        logits, slope, ids = _logits(hidden, numbered, chunks, softcap)
        candidates = _without_filling(logits, ids, vocab)
        hit = ids == targets[..., None].astype(ids.dtype)
        d_logits = d_lse[..., None] * jnp.exp(candidates - lse[..., None])
        d_logits += jnp.where(hit, d_target[..., None], 0)
        if smooth:
            # This reaches the columns that fill up the last chunk, too. They are zeros
            # for `hidden`, and their own gradient is cut off below.
            d_logits += d_mean[..., None] / vocab
        d_logits *= slope
        part, states = widen_range(numbered[0]), widen_range(hidden)
        d_logits, wide = (
            d_logits.astype(part.dtype),
            {"preferred_element_type": lse.dtype},
        )
        d_hidden += jnp.matmul(d_logits, part.T, **wide)
        d_part = jnp.tensordot(states, d_logits, (axes, axes), **wide)
        return d_hidden, d_part.astype(head.dtype)

    (start,) = vary_alike(jnp.zeros_like(hidden, lse.dtype), like=(hidden,))
    d_hidden, d_parts = lax.scan(add, start, _split(head, chunks))
    d_head = jnp.moveaxis(d_parts, 0, 2).reshape(head.shape[0], -1)[:, :vocab]
    return d_hidden.astype(hidden.dtype), d_head


_statistics.defvjp(_forward, _backward)


def _split(head, chunks):
    """Return the chunks of columns and their numbers, filled up with zeros.

    Chunk i of n holds the columns i, i + n, i + 2 n and so on. Devices that share the
    columns of `head` then all have a part of every chunk.
    """
    filled = jnp.pad(head, ((0, 0), (0, -head.shape[1] % chunks)))
    parts = filled.reshape(head.shape[0], -1, chunks)
    return jnp.moveaxis(parts, 2, 0), jnp.arange(chunks)


def _logits(hidden, numbered, chunks, softcap):
    """Return the logits of one chunk, their slope, and their ids in the vocabulary.

    The slope is the derivative of a logit by the product that it is computed from.
    """
    part, number = numbered
    wide = widen(hidden[:0]).dtype
    logits, slope = jnp.matmul(hidden, part, preferred_element_type=wide), 1.0
    if softcap is not None:
        bent = jnp.tanh(logits / softcap)
        logits, slope = softcap * bent, (1 + bent) * (1 - bent)
    ids = number + chunks * jnp.arange(part.shape[1])
    return logits, slope, jnp.expand_dims(ids, range(hidden.ndim - 1))


def _without_filling(logits, ids, vocab):
    """Return logits that give columns beyond the vocabulary no probability."""
    return jnp.where(ids < vocab, logits, _below(logits))


def _below(logits):
    """Return a finite number below any logit; `jax.debug_infs` forbids infinity."""
    return float(jnp.finfo(logits.dtype).min) / 2
