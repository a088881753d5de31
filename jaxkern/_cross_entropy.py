"""The loss of a language model, computed without storing all its logits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from ._core.checks import (
    as_int32,
    check_array,
    check_batched,
    check_floating,
    check_integer,
    check_shape,
)
from ._core.precision import widen, widen_range
from ._core.sharding import on_automatic_axes, vary_alike


def cross_entropy(
    hidden: Float[Array, "*batch embed_dim"],
    head: Float[Array, "embed_dim vocab"],
    targets: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    chunk: int = 4096,
) -> Float[Array, "*batch"]:
    r"""Return the cross-entropy of each token's target, in chunks of the vocabulary.

    $$\ell = \log \sum_v e^{z_v} - z_{\mathrm{target}}, \qquad
    z = h\,W_{\mathrm{head}}$$

    Logits exist for at most `chunk` columns of the vocabulary at a time. The backward
    pass computes them again, so memory holds tokens x `chunk` logits instead of tokens
    x vocab; it also holds one copy of `head`. The gradient is exact. There is no
    forward-mode derivative (`jax.jvp`).

    Logits and sums are float32, or float64 if the arguments are. For bfloat16 the
    gradient of the logits is rounded to bfloat16 before it is multiplied. For float16
    it stays float32, since it would underflow.

    Args:
        hidden: The features of each token, with any leading axes.
        head: The matrix that maps features to logits.
        targets: The index in the vocabulary that each token should predict.
        where: False for tokens whose loss is 0 and which get no gradient, whatever
            their target and features are. None counts all tokens.
        chunk: The largest number of columns of `head` to compute at once.

    Returns:
        The loss of each token, in float32 (or float64). It is NaN for a target that is
        not in the vocabulary.

    Raises:
        TypeError: `hidden` or `head` is not a floating-point array, their dtypes
            differ, `targets` is not an integer array, or `where` is not boolean.
        ValueError: The shapes do not fit, or `chunk` is not a positive integer.

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

    References:
        Recomputed logits: Liger Kernel, section 3.2, https://arxiv.org/abs/2410.10989.
        Chunks of columns: Cut Your Losses, https://arxiv.org/abs/2411.09009.
    """
    op = "cross_entropy"
    hidden, head = check_floating(op, hidden=hidden, head=head)
    check_batched(op, "hidden", hidden)
    given = f" for hidden of shape {hidden.shape}"
    check_shape(op, "head", head, (hidden.shape[-1], "vocab"), given)
    check_array(op, "targets", targets, "integer")
    check_shape(op, "targets", targets, hidden.shape[:-1], given)
    if where is not None:
        check_array(op, "where", where, "boolean")
        check_shape(op, "where", where, hidden.shape[:-1], given)
    chunks = -(-head.shape[1] // check_integer(op, "chunk", chunk))
    targets = as_int32(targets)
    if where is not None:
        # Without this, features that are NaN would make the gradient of `head` NaN,
        # although they are multiplied by 0.
        hidden = jnp.where(where[..., None], hidden, 0)
        targets = jnp.where(where, targets, 0)
    losses = _by_chunks(hidden, head, targets, chunks)
    return losses if where is None else jnp.where(where, losses, 0)


@on_automatic_axes(lambda hidden: PartitionSpec(*hidden[:-1]))
def _by_chunks(hidden, head, targets, chunks):
    return _losses(*vary_alike(hidden, head, targets), chunks)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _losses(hidden, head, targets, chunks):
    return _forward(hidden, head, targets, chunks)[0]


# `jit` here, and at the gradient, so that eager calls compile once.
@partial(jax.jit, static_argnames="chunks")
def _forward(hidden, head, targets, chunks):
    vocab = head.shape[1]

    def add(carry, numbered):
        top, total, target_logit = carry
        logits, ids = _logits(hidden, numbered, chunks, vocab)
        higher = jnp.maximum(top, logits.max(-1))
        weights = jnp.exp(logits - higher[..., None])
        total = total * jnp.exp(top - higher) + weights.sum(-1)
        hit = ids == targets[..., None].astype(ids.dtype)
        return (higher, total, target_logit + jnp.where(hit, logits, 0).sum(-1)), None

    zero = jnp.zeros_like(hidden[..., 0], widen(hidden[:0]).dtype)
    inside = (targets >= 0) & (targets < vocab)
    start = zero + _below(zero), zero, jnp.where(inside, zero, jnp.nan)
    carry, _ = lax.scan(add, vary_alike(*start, like=(hidden,)), _split(head, chunks))
    top, total, target_logit = carry
    lse = top + jnp.log(total)
    return lse - target_logit, (hidden, head, targets, lse)


def _backward(chunks, saved, g):
    return *_gradients(*saved, g, chunks), None


@partial(jax.jit, static_argnames="chunks")
def _gradients(hidden, head, targets, lse, g, chunks):
    vocab = head.shape[1]
    axes = tuple(range(targets.ndim))

    def add(d_hidden, numbered):
        logits, ids = _logits(hidden, numbered, chunks, vocab)
        hit = (ids == targets[..., None].astype(ids.dtype)).astype(lse.dtype)
        d_logits = g[..., None] * (jnp.exp(logits - lse[..., None]) - hit)
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


_losses.defvjp(_forward, _backward)


def _split(head, chunks):
    """Return the chunks of columns and their numbers, filled up with zeros.

    Chunk i of n holds the columns i, i + n, i + 2 n and so on. Devices that share the
    columns of `head` then all have a part of every chunk.
    """
    filled = jnp.pad(head, ((0, 0), (0, -head.shape[1] % chunks)))
    parts = filled.reshape(head.shape[0], -1, chunks)
    return jnp.moveaxis(parts, 2, 0), jnp.arange(chunks)


def _logits(hidden, numbered, chunks, vocab):
    """Return the logits of one chunk, and the index of each in the vocabulary."""
    part, number = numbered
    wide = widen(hidden[:0]).dtype
    logits = jnp.matmul(hidden, part, preferred_element_type=wide)
    ids = number + chunks * jnp.arange(part.shape[1])
    ids = jnp.expand_dims(ids, range(hidden.ndim - 1))
    return jnp.where(ids < vocab, logits, _below(logits)), ids


def _below(logits):
    """Return a finite number below any logit; `jax.debug_infs` forbids infinity."""
    return float(jnp.finfo(logits.dtype).min) / 2
