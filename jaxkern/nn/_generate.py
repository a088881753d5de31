"""Generation of tokens with a language model, one after another."""

from collections.abc import Iterator, Sequence
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
from ._cache import KVCache, places_with_cache
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


def read_lengths(op: str, name: str, lengths: Any, of: str, tokens: Any) -> jax.Array:
    """Return the checked lengths of rows of tokens in int32.

    Args:
        op: The name of the caller.
        name: The name of the lengths.
        lengths: The number of tokens of each row.
        of: The name of the tokens.
        tokens: The tokens.
    """
    check_array(op, name, lengths, "integer")
    given = f" for {of} of shape {tokens.shape}"
    check_shape(op, name, lengths, tokens.shape[:1], given)
    check_range(op, name, known(lengths), 1, tokens.shape[1])
    return as_int32(lengths)


def without_padding(
    tokens: Integer[Array, "batch seq"], lengths: Integer[Array, " batch"]
) -> Integer[Array, "batch seq"]:
    """Put zeros where a row has no tokens: there may be any integers."""
    return jnp.where(_is_read(tokens, lengths), tokens, 0)


def _is_read(tokens, lengths):
    return jnp.arange(tokens.shape[1], dtype=lengths.dtype)[None] < lengths[:, None]


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
    size: int,
) -> Integer[Array, "batch total"]:
    """Continue each prompt by `count` tokens, in one compiled program.

    Args:
        model: The model.
        prompt: The prompts.
        lengths: The length of each prompt; None for that of the array.
        sampling: How to choose tokens.
        top_k: As in `TransformerLM.generate`.
        count: The number of new tokens.
        cache: Whether to keep keys and values.
        size: The number of places for a prompt. Prompts of equal `size` share the
            program.
    """
    graph, state = nnx.split(model)
    given = *_fill(prompt, lengths, size), sampling
    tokens = _generate(graph, count, cache, top_k, state, *given)
    return tokens[:, : prompt.shape[1] + count]


def stream(
    model: nnx.Module,
    prompt: Integer[Array, "batch seq"],
    lengths: Integer[Array, " batch"] | None,
    sampling: Sampling,
    top_k: int | None,
    count: int,
    cache: bool,
    size: int,
) -> Iterator[Integer[Array, " batch"]]:
    """Yield the new tokens of `generate` one after another.

    The arguments are those of `generate`.
    """
    graph, state = nnx.split(model)
    prompt, lengths = _fill(prompt, lengths, size)
    token, memory, chosen = _begin(
        graph, count, cache, top_k, state, prompt, lengths, sampling
    )
    yield token
    for _ in range(count - 1):
        if sampling.stop_tokens is not None and chosen.stopped.all():
            return
        token, memory, chosen = _next(
            graph, top_k, state, token, memory, chosen, lengths, sampling
        )
        yield token


def _fill(prompt, lengths, size):
    """Fill prompts up with zeros, and return the length of each."""
    batch, seq = prompt.shape
    if lengths is None:
        lengths = jnp.full(batch, seq, jnp.int32)
    return (prompt if seq == size else _pad(prompt, size - seq)), lengths


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(graph, count, cache, top_k, state, prompt, lengths, sampling):
    model = nnx.merge(graph, state)
    return _go_on(model, prompt, lengths, sampling, top_k, count, cache)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _begin(graph, count, cache, top_k, state, prompt, lengths, sampling):
    model = nnx.merge(graph, state)
    start = on_automatic_axes(lambda prompt: _places(prompt, cache))(_start)
    return start(model, prompt, lengths, sampling, top_k, count, cache)


@partial(
    jax.jit, static_argnames=("graph", "top_k"), donate_argnames=("memory", "chosen")
)
def _next(graph, top_k, state, token, memory, chosen, lengths, sampling):
    model = nnx.merge(graph, state)
    return _step(model, _Decoding(token, memory, chosen), lengths, sampling, top_k)


@on_automatic_axes(lambda prompt: PartitionSpec(*prompt[:1]))
def _go_on(model, prompt, lengths, sampling, top_k, count, cache):
    decoding = _start(model, prompt, lengths, sampling, top_k, count, cache)
    decoding = lax.while_loop(
        lambda decoding: decoding.chosen.go_on(),
        lambda decoding: _step(model, decoding, lengths, sampling, top_k),
        decoding,
    )
    prompt = without_padding(prompt, lengths)
    return _put(_pad(prompt, count), lengths, decoding.chosen.tokens)


class _Decoding(NamedTuple):
    """The state between two tokens.

    Attributes:
        token: The newest token.
        memory: The cache of all tokens before it; without a cache these tokens
            themselves, and zeros.
        chosen: The new tokens so far.
    """

    token: Integer[Array, " batch"]
    memory: KVCache | Integer[Array, "batch total"]
    chosen: "_Chosen"


def _places(prompt: PartitionSpec, cache: bool) -> _Decoding:
    """Say where the state lies, by the placement of the prompt."""
    batch = PartitionSpec(*prompt[:1])
    memory = places_with_cache(prompt)[1] if cache else batch
    chosen = _Chosen._make([batch, PartitionSpec(), batch, batch])
    return _Decoding._make([batch, memory, chosen])


def _start(model, prompt, lengths, sampling, top_k, count, cache) -> _Decoding:
    """Read the prompts, and choose the first new token of each."""
    batch, seq = prompt.shape
    is_read = _is_read(prompt, lengths)
    prompt = without_padding(prompt, lengths)
    seen = None
    if sampling.repetition_penalty is not None:
        rows = jnp.arange(batch)[:, None]
        seen = jnp.zeros((batch, model.vocab_size), bool)
        seen = seen.at[rows, prompt].max(is_read)
    chosen = _Chosen(
        jnp.zeros((batch, count), jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(batch, bool),
        seen,
    )
    if cache:
        memory = model.make_cache(batch, seq + count)
        features, memory = model.extend(prompt, memory, lengths)
    else:
        memory = _pad(prompt, count)
        features = model.features(memory)
    return _choose_from(model, features, lengths - 1, memory, chosen, sampling, top_k)


@on_automatic_axes(lambda decoding: decoding)
def _step(model, decoding, lengths, sampling, top_k) -> _Decoding:
    """Read the newest token of each sequence, and choose the next."""
    token, memory, chosen = decoding
    if isinstance(memory, KVCache):
        places = 0
        features, memory = model.extend(token[:, None], memory)
    else:
        places = lengths + chosen.number - 1
        memory = _put(memory, places, token[:, None])
        # The model is causal, so later places, which hold no tokens yet, do not matter.
        features = model.features(memory)
    return _choose_from(model, features, places, memory, chosen, sampling, top_k)


def _choose_from(model, features, places, memory, chosen, sampling, top_k):
    """Choose the token that follows the one at a place of each row."""
    last = features[jnp.arange(len(features)), places]
    token, chosen = _choose(model.logits(last), chosen, sampling=sampling, top_k=top_k)
    return _Decoding(token, memory, chosen)


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


def _pad(tokens, more):
    return jnp.pad(tokens, ((0, 0), (0, more)))


def _put(tokens, places, new):
    """Write `new` into each row, from its place on."""
    rows = jnp.arange(len(tokens))[:, None]
    columns = places[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None]
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
