"""The loss of a language model, without all its logits at once."""

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
    r"""Cross-entropy of each token's target under a softmax over the vocabulary.

    $$\ell = \log \sum_v e^{z_v} - z_{\mathrm{target}}, \quad z = h\,W_{\mathrm{head}}$$

    Computed over at most `chunk` columns of the vocabulary at a time, twice: forward,
    and again backward. Besides the arguments, their gradients and a copy of `head`,
    memory holds tokens x `chunk` logits. Saved for the backward are the arguments and
    one log-sum-exp a token. The gradient is exact; there is no forward-mode derivative.

    Logits, sums and the result are float32, float64 if the arguments are. The gradient
    of the logits is rounded to the dtype of `hidden` if that is bfloat16, and not if it
    is float16, in which it would underflow: then its products are float32.

    Chunk $i$ of $n$ holds the columns $i, i + n, ...$: where devices share the columns,
    each has its part of every chunk.

    Args:
        where: False for tokens whose loss is 0 and that have no gradient, whatever
            their target and their `hidden`.
        chunk: the most columns at a time.

    Returns:
        The loss of each token; NaN for a target that is not in the vocabulary.

    Raises:
        TypeError: `hidden` or `head` is no floating-point array, their dtypes differ,
            `targets` is no integer array, or `where` no boolean one.
        ValueError: the shapes do not fit, or `chunk` is not a positive integer.

    References:
        Recomputed logits: Liger Kernel, section 3.2, https://arxiv.org/abs/2410.10989;
        by columns: Cut Your Losses, https://arxiv.org/abs/2411.09009.
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
        # Whatever they are: 0 times a NaN would be NaN in the gradient of `head`.
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


# Compiled once for all calls that are not within jit, as is its gradient.
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
    """The chunks of columns and their numbers; zeros fill the last ones up."""
    filled = jnp.pad(head, ((0, 0), (0, -head.shape[1] % chunks)))
    parts = filled.reshape(head.shape[0], -1, chunks)
    return jnp.moveaxis(parts, 2, 0), jnp.arange(chunks)


def _logits(hidden, numbered, chunks, vocab):
    """Of one chunk, and which tokens of the vocabulary they belong to."""
    part, number = numbered
    wide = widen(hidden[:0]).dtype
    logits = jnp.matmul(hidden, part, preferred_element_type=wide)
    ids = number + chunks * jnp.arange(part.shape[1])
    ids = jnp.expand_dims(ids, range(hidden.ndim - 1))
    return jnp.where(ids < vocab, logits, _below(logits)), ids


def _below(logits):
    """Less than any logit, and finite, as `jax.debug_infs` has it."""
    return float(jnp.finfo(logits.dtype).min) / 2
