"""Tokens from a language model, one after another."""

from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32

from .._checks import check_key


class Sampling(NamedTuple):
    """How to choose a token; without a key it is the likeliest."""

    key: Key[Array, ""] | UInt32[Array, "2"] | None
    temperature: float
    top_p: float


def check_sampling(op: str, temperature: Any, top_p: Any, key: object) -> None:
    for name, value in [("temperature", temperature), ("top_p", top_p)]:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(f"{op}: {name} must be a number, got {value!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be above 0 and at most 1, got {top_p}")
    if temperature:
        check_key(op, key, " at a temperature above 0")
    elif key is not None:
        raise TypeError(f"{op}: key must be None at temperature 0, got one")


def generate(
    model: nnx.Module,
    prompt: Int[Array, "batch seq"],
    sampling: Sampling,
    count: int,
    cache: bool,
) -> Int[Array, "batch total"]:
    graph, state = nnx.split(model)
    return _generate(graph, count, cache, state, prompt, sampling)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graph, count, cache, state, prompt, sampling):
    model = nnx.merge(graph, state)
    run = _with_cache if cache else _without_cache
    return jnp.concatenate([prompt, run(model, prompt, sampling, count)], axis=1)


def _with_cache(model, prompt, sampling, count):
    def next_token(tokens, cache, i):
        features, cache = model.extend(tokens, cache)
        logits = model.logits(features[:, -1])
        return _sample(logits, sampling, i).astype(prompt.dtype), cache

    def step(carry, i):
        token, cache = carry
        token, cache = next_token(token[:, None], cache, i)
        return (token, cache), token

    batch, seq = prompt.shape
    # The last token is never one of the keys.
    cache = model.make_cache(batch, seq + count - 1)
    first = next_token(prompt, cache, 0)
    _, others = lax.scan(step, first, jnp.arange(1, count))
    return jnp.concatenate([first[0][:, None], others.T], axis=1)


def _without_cache(model, prompt, sampling, count):
    seq = prompt.shape[1]

    def step(tokens, i):
        # Later places hold nothing yet, and no earlier one sees them.
        features = model.features(tokens)
        last = lax.dynamic_index_in_dim(features, seq - 1 + i, 1, keepdims=False)
        token = _sample(model.logits(last), sampling, i).astype(tokens.dtype)
        return tokens.at[:, seq + i].set(token), None

    tokens = jnp.pad(prompt, ((0, 0), (0, count)))
    tokens, _ = lax.scan(step, tokens, jnp.arange(count))
    return tokens[:, seq:]


def _sample(
    logits: Float[Array, "batch vocab"], sampling: Sampling, i: Int[Array, ""] | int
) -> Int[Array, " batch"]:
    key, temperature, top_p = sampling
    if key is None:
        return logits.argmax(-1)
    logits = _keep_top(logits / temperature, top_p)
    return jax.random.categorical(jax.random.fold_in(key, i), logits)


def _keep_top(
    logits: Float[Array, "batch vocab"], top_p: Float[Array, ""] | float
) -> Float[Array, "batch vocab"]:
    """-inf for tokens where likelier ones have `top_p` of the probability already."""
    falling = -jnp.sort(-logits)
    before = jnp.cumsum(jax.nn.softmax(falling), axis=-1) - jax.nn.softmax(falling)
    least = jnp.where(before < top_p, falling, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
