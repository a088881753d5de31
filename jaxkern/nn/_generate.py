"""Generation of tokens with a language model, one after another."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, Key, UInt32

from .._core.checks import check_key, check_number
from .._core.sharding import on_automatic_axes


class Sampling(NamedTuple):
    """How to choose a token; without a key it is the likeliest."""

    key: Key[Array, ""] | UInt32[Array, "2"] | None
    temperature: float
    top_p: float


def check_sampling(op: str, temperature: Any, top_p: Any, key: Any) -> Sampling:
    """Return the checked options of sampling."""
    check_number(op, "temperature", temperature, least=0.0)
    check_number(op, "top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be above 0 and at most 1, got {top_p}")
    if temperature:
        check_key(op, key, " at a temperature above 0")
    elif key is not None:
        raise TypeError(f"{op}: key must be None at temperature 0, got one")
    return Sampling(key, float(temperature), float(top_p))


def generate(
    model: nnx.Module,
    prompt: Integer[Array, "batch seq"],
    lengths: Integer[Array, " batch"] | None,
    sampling: Sampling,
    count: int,
    cache: bool,
) -> Integer[Array, "batch total"]:
    """Continue each prompt by `count` tokens, in one compiled program."""
    graph, state = nnx.split(model)
    return _generate(graph, count, cache, state, prompt, lengths, sampling)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graph, count, cache, state, prompt, lengths, sampling):
    model = nnx.merge(graph, state)
    return _go_on(model, prompt, lengths, sampling, count, cache)


@on_automatic_axes(lambda prompt: PartitionSpec(*prompt[:1]))
def _go_on(model, prompt, lengths, sampling, count, cache):
    run = _with_cache if cache else _without_cache
    if lengths is None:
        new = run(model, prompt, prompt.shape[1], sampling, count)
        return jnp.concatenate([prompt, new], axis=1)
    # Zeros replace whatever follows a shorter prompt: it need not be tokens.
    places = jnp.arange(prompt.shape[1], dtype=lengths.dtype)[None]
    is_read = places < lengths[:, None]
    prompt = jnp.where(is_read, prompt, 0)
    new = run(model, prompt, lengths, sampling, count)
    return _put(jnp.pad(prompt, ((0, 0), (0, count))), lengths, new)


def _with_cache(model, prompt, lengths, sampling, count):
    """Return the new tokens, from a cache of keys and values."""

    def next_token(features, i):
        return _sample(model.logits(features), sampling, i)

    def step(carry, i):
        token, cache = carry
        features, cache = model.extend(token[:, None], cache)
        token = next_token(features[:, -1], i)
        return (token, cache), token

    batch, seq = prompt.shape
    # The last new token needs no place in the cache: no token attends to it.
    cache = model.make_cache(batch, seq + count - 1)
    features, cache = model.extend(prompt, cache)
    # The keys of what follows a shorter prompt are overwritten before any token sees
    # them.
    first = next_token(_take(features, lengths - 1), 0)
    carry = first, cache._replace(length=jnp.asarray(lengths, cache.length.dtype))
    _, others = lax.scan(step, carry, jnp.arange(1, count))
    return jnp.concatenate([first[:, None], others.T], axis=1)


def _without_cache(model, prompt, lengths, sampling, count):
    """Return the new tokens, from a run over the whole sequence for each."""

    def step(tokens, i):
        # The model is causal, so later places, which hold no tokens yet, do not matter.
        last = _take(model.features(tokens), lengths - 1 + i)
        token = _sample(model.logits(last), sampling, i)
        return _put(tokens, lengths + i, token[:, None]), token

    tokens = jnp.pad(prompt, ((0, 0), (0, count)))
    _, new = lax.scan(step, tokens, jnp.arange(count))
    return new.T


def _take(x, places):
    """Return `x[i, places[i]]` of each row i; `places` may be one number."""
    return x[jnp.arange(len(x)), places]


def _put(tokens, places, new):
    """Write `new` into each row, from its place on; `places` may be one number."""
    rows = jnp.arange(len(tokens))[:, None]
    first = jnp.reshape(jnp.asarray(places, jnp.int32), (-1, 1))
    columns = first + jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    return tokens.at[rows, columns].set(new)


def _sample(
    logits: Float[Array, "batch vocab"], sampling: Sampling, i: Integer[Array, ""] | int
) -> Integer[Array, " batch"]:
    """Choose token number `i` of each sequence."""
    key, temperature, top_p = sampling
    if key is None:
        return lax.argmax(logits, logits.ndim - 1, jnp.int32)
    # Without this, a temperature below the least normal number would count as 0, and
    # the largest logit would be 0 / 0.
    temperature = jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    kept = lax.cond(top_p < 1, _keep_top, lambda logits, _: logits, logits, top_p)
    token = jax.random.categorical(jax.random.fold_in(key, i), kept)
    return token.astype(jnp.int32)


def _keep_top(
    logits: Float[Array, "batch vocab"], top_p: Float[Array, ""] | float
) -> Float[Array, "batch vocab"]:
    """Replace logits by -inf where likelier tokens have `top_p` of the probability."""
    falling = -jnp.sort(-logits)
    p = jax.nn.softmax(falling)
    # Likelier tokens have `top_p` where this one and less likely ones have at most
    # 1 - top_p. Of these two sums the smaller is precise: many unlikely tokens would be
    # lost in a sum near 1.
    before, after = jnp.cumsum(p, -1) - p, lax.cumsum(p, p.ndim - 1, reverse=True)
    kept = jnp.where(top_p < 0.5, before < top_p, after > 1 - top_p)
    # The likeliest token stays for any `top_p`, also for one that is rounded to 0.
    kept = kept.at[..., 0].set(True)
    least = jnp.where(kept, falling, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
