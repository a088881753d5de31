"""Generation of tokens with a language model, one after another."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer, Key, UInt32

from .._core.checks import (
    as_int32,
    check_array,
    check_floating,
    check_integer,
    check_key,
    check_number,
    check_shape,
    kind_of,
)
from .._core.sharding import on_automatic_axes
from ._common import check_range, known


class Sampling(NamedTuple):
    """How to choose a token, and when to stop; without a key it is the likeliest.

    The arrays and numbers of `None` are not used, and programs do without them.
    """

    key: Key[Array, ""] | UInt32[Array, "2"] | None
    temperature: Any
    top_p: float
    min_p: float
    repetition_penalty: float | None
    stop_tokens: Integer[Array, " stop"] | None


def check_sampling(
    op: str,
    batch: int,
    vocab_size: int,
    key: Any,
    *,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    repetition_penalty: Any,
    stop_tokens: Any,
) -> tuple[Sampling, int | None]:
    """Return the checked options of sampling, and `top_k`."""
    check_number(op, "top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be above 0 and at most 1, got {top_p}")
    check_number(op, "min_p", min_p, least=0.0)
    if min_p > 1:
        raise ValueError(f"{op}: min_p must be at most 1, got {min_p}")
    check_number(op, "repetition_penalty", repetition_penalty, positive=True)
    if top_k is not None:
        # No more tokens than there are can be chosen from.
        top_k = min(check_integer(op, "top_k", top_k), vocab_size)
    temperature = _read_temperature(op, temperature, batch)
    if isinstance(temperature, jax.Array):
        check_key(op, key, " for an array of temperatures")
    elif temperature:
        check_key(op, key, " at a temperature above 0")
    elif key is not None:
        raise TypeError(f"{op}: key must be None at temperature 0, got one")
    penalty = None if repetition_penalty == 1 else float(repetition_penalty)
    stop = _read_stop_tokens(op, stop_tokens, vocab_size)
    return Sampling(key, temperature, float(top_p), float(min_p), penalty, stop), top_k


def read_prompt_lengths(op: str, lengths: Any, prompt: Any) -> jax.Array:
    """Return the checked lengths of prompts in int32."""
    check_array(op, "prompt_lengths", lengths, "integer")
    given = f" for prompt of shape {prompt.shape}"
    check_shape(op, "prompt_lengths", lengths, prompt.shape[:1], given)
    check_range(op, "prompt_lengths", known(lengths), 1, prompt.shape[1])
    return as_int32(lengths)


def _read_temperature(op, temperature, batch) -> Any:
    if not isinstance(temperature, jax.Array | np.ndarray) or temperature.ndim == 0:
        check_number(op, "temperature", temperature, least=0.0)
        return float(temperature)
    (temperature,) = check_floating(op, temperature=temperature)
    check_shape(op, "temperature", temperature, (batch,))
    values = known(temperature)
    if values is not None and not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(
            f"{op}: temperature must be finite and at least 0, got {values}"
        )
    return temperature


def _read_stop_tokens(op, stop_tokens, vocab_size) -> jax.Array | None:
    if not isinstance(stop_tokens, Sequence) or isinstance(stop_tokens, str):
        kind = kind_of(stop_tokens)
        raise TypeError(f"{op}: stop_tokens must be a sequence of tokens, got {kind}")
    tokens = [
        check_integer(op, f"stop_tokens[{i}]", token, least=0)
        for i, token in enumerate(stop_tokens)
    ]
    if not tokens:
        return None
    check_range(op, "stop_tokens", np.array(tokens), 0, vocab_size - 1)
    return jnp.array(tokens, jnp.int32)


def generate(
    model: nnx.Module,
    prompt: Integer[Array, "batch seq"],
    lengths: Integer[Array, " batch"] | None,
    sampling: Sampling,
    top_k: int | None,
    count: int,
    cache: bool,
) -> Integer[Array, "batch total"]:
    """Continue each prompt by `count` tokens, in one compiled program."""
    graph, state = nnx.split(model)
    return _generate(graph, count, cache, top_k, state, prompt, lengths, sampling)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(graph, count, cache, top_k, state, prompt, lengths, sampling):
    model = nnx.merge(graph, state)
    return _go_on(model, prompt, lengths, sampling, top_k, count, cache)


@on_automatic_axes(lambda prompt: PartitionSpec(*prompt[:1]))
def _go_on(model, prompt, lengths, sampling, top_k, count, cache):
    run = _with_cache if cache else _without_cache
    is_read = None
    if lengths is not None:
        # Zeros replace whatever follows a shorter prompt: it need not be tokens.
        places = jnp.arange(prompt.shape[1], dtype=lengths.dtype)[None]
        is_read = places < lengths[:, None]
        prompt = jnp.where(is_read, prompt, 0)
    choose = partial(_choose, sampling=sampling, top_k=top_k)
    seen = None
    if sampling.repetition_penalty is not None:
        rows = jnp.arange(len(prompt))[:, None]
        seen = jnp.zeros((len(prompt), model.vocab_size), bool)
        seen = seen.at[rows, prompt].max(True if is_read is None else is_read)
    chosen = _Chosen(
        jnp.zeros((len(prompt), count), jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(len(prompt), bool),
        seen,
    )
    new = run(model, prompt, lengths, choose, chosen)
    if lengths is None:
        return jnp.concatenate([prompt, new], axis=1)
    return _put(jnp.pad(prompt, ((0, 0), (0, count))), lengths, new)


class _Chosen(NamedTuple):
    """The new tokens so far.

    Attributes:
        tokens: The new tokens, and zeros.
        number: How many they are.
        stopped: Whether a sequence has had a token that stops it.
        seen: Whether a token is in a sequence; None if that does not matter.
    """

    tokens: Integer[Array, "batch count"]
    number: Integer[Array, ""]
    stopped: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"] | None

    def go_on(self) -> Bool[Array, ""]:
        """Whether a token is missing."""
        return (self.number < self.tokens.shape[1]) & ~self.stopped.all()


def _choose(logits, chosen, *, sampling, top_k):
    """Choose the next token of each sequence; a stopped one gets a zero."""
    if chosen.seen is not None:
        penalty = sampling.repetition_penalty
        punished = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(chosen.seen, punished, logits)
    token = _sample(logits, sampling, top_k, chosen.number)
    stopped, seen = chosen.stopped, chosen.seen
    if sampling.stop_tokens is not None:
        token = jnp.where(stopped, 0, token)
        stops = (token[:, None] == sampling.stop_tokens[None]).any(1)
        stopped = stopped | stops
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    tokens = lax.dynamic_update_slice_in_dim(
        chosen.tokens, token[:, None], chosen.number, axis=1
    )
    return token, _Chosen(tokens, chosen.number + 1, stopped, seen)


def _with_cache(model, prompt, lengths, choose, chosen):
    """Return the new tokens, from a cache of keys and values."""

    def step(carry):
        token, cache, chosen = carry
        features, cache = model.extend(token[:, None], cache)
        token, chosen = choose(model.logits(features[:, -1]), chosen)
        return token, cache, chosen

    batch, seq = prompt.shape
    # The last new token needs no place in the cache: no token attends to it.
    cache = model.make_cache(batch, seq + chosen.tokens.shape[1] - 1)
    features, cache = model.extend(prompt, cache)
    # The keys of what follows a shorter prompt are overwritten before any token sees
    # them.
    lengths = seq if lengths is None else lengths
    cache = cache._replace(length=jnp.asarray(lengths, cache.length.dtype))
    token, chosen = choose(model.logits(_take(features, lengths - 1)), chosen)
    carry = lax.while_loop(
        lambda carry: carry[-1].go_on(), step, (token, cache, chosen)
    )
    return carry[-1].tokens


def _without_cache(model, prompt, lengths, choose, chosen):
    """Return the new tokens, from a run over the whole sequence for each."""
    lengths = prompt.shape[1] if lengths is None else lengths

    def step(carry):
        tokens, chosen = carry
        places = lengths + chosen.number
        # The model is causal, so later places, which hold no tokens yet, do not matter.
        last = _take(model.features(tokens), places - 1)
        token, chosen = choose(model.logits(last), chosen)
        return _put(tokens, places, token[:, None]), chosen

    tokens = jnp.pad(prompt, ((0, 0), (0, chosen.tokens.shape[1])))
    carry = lax.while_loop(lambda carry: carry[-1].go_on(), step, (tokens, chosen))
    return carry[-1].tokens


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
    logits: Float[Array, "batch vocab"],
    sampling: Sampling,
    top_k: int | None,
    i: Integer[Array, ""],
) -> Integer[Array, " batch"]:
    """Choose token number `i` of each sequence."""
    likeliest = lax.argmax(logits, logits.ndim - 1, jnp.int32)
    if sampling.key is None:
        return likeliest
    given = jnp.reshape(sampling.temperature, (-1, 1)).astype(logits.dtype)
    # Without this, a temperature below the least normal number would count as 0, and
    # the largest logit would be 0 / 0.
    temperature = jnp.maximum(given, jnp.finfo(logits.dtype).tiny)
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    if top_k is not None:
        least = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    top_p, min_p = sampling.top_p, sampling.min_p
    kept = lax.cond(top_p < 1, _keep_top, lambda logits, _: logits, logits, top_p)
    # The largest logit is 0.
    kept = jnp.where(logits >= jnp.log(min_p), kept, -jnp.inf)
    token = jax.random.categorical(jax.random.fold_in(sampling.key, i), kept)
    token = token.astype(jnp.int32)
    if jnp.ndim(sampling.temperature) == 0:
        return token
    return jnp.where(given[:, 0] > 0, token, likeliest)


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
