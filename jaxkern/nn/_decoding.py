"""The language model one token after another, with a cache of keys and values."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Integer, Key, UInt32

from .._core.checks import as_int32, check_array, check_flag, check_integer
from .._core.sharding import on_automatic_axes, vary_alike
from ._cache import KVCache, empty_cache, places_with_cache
from ._common import check_arguments, known, read_tokens
from ._generate import (
    check_sampling,
    generate,
    read_lengths,
    stream,
    without_padding,
)
from ._layers import run_layers
from ._transformer_forward import Forward, check_length

# The places for the shortest prompts. More of them cost little, and each number of
# places is compiled anew.
LEAST_PLACES = 16


class Decoding(Forward):
    """A language model's cache, and the continuation of prompts."""

    windows: Sequence[int | None]
    cache_shape: tuple[int, int]
    why_no_cache: str | None
    any_length: bool

    def make_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache.

        Args:
            batch: The number of sequences.
            capacity: The largest number of tokens of a sequence.

        Returns:
            The cache.

        Raises:
            ValueError: The model's `attention_fn` has an option `axis_name`, a size is
                negative or not an integer, or `capacity` is 0 or above
                `context_length`.
        """
        op = "TransformerLM.make_cache"
        if self.why_no_cache is not None:
            raise ValueError(f"{op}: {self.why_no_cache}")
        batch = check_integer(op, "batch", batch, least=0)
        capacity = check_integer(op, "capacity", capacity)
        check_length(op, "capacity", capacity, self.context_length)
        shape = batch, capacity, *self.cache_shape
        return empty_cache(self.windows, shape, self.dtype)

    @on_automatic_axes(places_with_cache)
    def extend(
        self,
        tokens: Integer[Array, "batch seq"],
        cache: KVCache,
        lengths: Integer[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch seq embed_dim"], KVCache]:
        """Return the features of new tokens behind a cache, and the longer cache.

        Args:
            tokens: The new tokens.
            cache: The keys and values of the tokens before them.
            lengths: How many of the new tokens each row has; None for all. What follows
                them is not read and not kept, and its features mean nothing.

        Returns:
            The features of the new tokens, and the cache with their keys and values.

        Raises:
            TypeError: `tokens` or `lengths` is not an integer array.
            ValueError: A token or a length is out of range, or there are more tokens
                than the capacity; both are checked outside of `jit` only.
        """
        op = "TransformerLM.extend"
        self._check_tokens(op, "tokens", tokens)
        check_array(op, "cache.length", cache.length, "integer")
        seq = tokens.shape[1]
        if lengths is not None:
            lengths = read_lengths(op, "lengths", lengths, "tokens", tokens)
        before, new = known(cache.length), seq if lengths is None else known(lengths)
        if before is not None and new is not None:
            most, limit = self._most_tokens(cache)
            length = int((before + new).max(initial=0))
            check_length(op, "tokens and cache", length, most, limit)
        tokens = read_tokens(op, "tokens", tokens, self.vocab_size, lengths)
        cache = cache._replace(length=as_int32(cache.length))
        count = seq
        if lengths is not None:
            count, tokens = lengths, without_padding(tokens, lengths)

        def step(kind, carry, layer, number):
            return layer.extend(*carry, kind=kind, number=number, count=count)

        x = self._embed(tokens)
        x, *leaves = vary_alike(x, *jax.tree.leaves(cache))
        cache = jax.tree.unflatten(jax.tree.structure(cache), leaves)
        x, cache = run_layers(self.layers, self.kinds, step, (x, cache))
        return self.norm(x), cache._replace(length=cache.length + count)

    def _most_tokens(self, cache: KVCache) -> tuple[int, str]:
        """Return how many tokens a cache can follow, and the name of this limit."""
        if cache.keys is not None:
            return cache.keys.shape[2], "capacity"
        assert cache.window_keys is not None
        places = cache.window_keys.shape[2]
        if places < max(window for window in self.windows if window is not None):
            return places, "capacity"
        return self.context_length, "context_length"

    def generate(
        self,
        prompt: Integer[Array, "batch seq"],
        *,
        max_new_tokens: int,
        prompt_lengths: Integer[Array, " batch"] | None = None,
        temperature: float | Float[Array, " batch"] = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] = (),
        key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
        cache: bool = True,
    ) -> Integer[Array, "batch seq+{max_new_tokens}"]:
        """Continue each prompt, and return the prompts with the new tokens in int32.

        With a cache it compiles once for all prompts of 16 tokens at most, of 32, 64
        and so on, for each size of the batch, number of new tokens and `top_k`. Without
        one, or with an `attention_fn` that lacks the options `is_causal` and `mask`, it
        compiles for each length of the prompt. The options of sampling apply in the
        order in which they are listed here, but for `repetition_penalty`, which comes
        first.

        Args:
            prompt: The tokens to continue.
            max_new_tokens: The number of new tokens for each prompt.
            prompt_lengths: The length of each prompt; None if all have the length of
                the array. What follows a shorter prompt in its row is not read and may
                be any integers: the new tokens come right behind the prompt, as if it
                were alone, and zeros fill the row.
            temperature: The number that divides the logits, or one for each prompt. 0
                takes the likeliest token, which `top_k`, `top_p` and `min_p` keep.
            top_k: Sample from this many likeliest tokens, and from any that are as
                likely as the last of them. None samples from all.
            top_p: Sample from the fewest tokens whose probabilities sum to at least
                this, and from any that are as likely as the last of them. 1 samples
                from all tokens.
            min_p: Sample from tokens at least this times as likely as the likeliest.
                0 samples from all.
            repetition_penalty: Divide positive logits of tokens that are in the prompt
                or were generated by it, and multiply negative ones by it, at any
                temperature. 1 changes nothing.
            stop_tokens: Tokens that end a sequence. Zeros follow them, and when all
                sequences have ended, no more is computed.
            key: A random key; needed at a temperature above 0 and for an array of
                temperatures, and only there.
            cache: Keep keys and values instead of running the whole sequence for each
                token. The result is the same except for rounding.

        Returns:
            The prompts and the new tokens.

        Raises:
            TypeError: `prompt` or `prompt_lengths` is not an integer array, a number is
                not a number, `stop_tokens` is not a sequence, a key is missing, there
                is a key at temperature 0, or `cache` is neither True nor False.
            ValueError: A shape does not fit; a token, a length or a number is out of
                range; or `cache` is True and the model's `attention_fn` has an option
                `axis_name`.

        References:
            top_k: https://arxiv.org/abs/1805.04833, section 5.3.
            top_p: https://arxiv.org/abs/1904.09751, section 3.1.
            min_p: https://arxiv.org/abs/2407.01082, section 3.2.
            repetition_penalty: CTRL, section 4.1, https://arxiv.org/abs/1909.05858.
                Negative logits are multiplied, as Hugging Face's code does.
        """
        given = self._read_prompt(
            "TransformerLM.generate",
            prompt,
            key,
            cache,
            max_new_tokens,
            prompt_lengths,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_tokens=stop_tokens,
        )
        return generate(self, *given)

    def stream(
        self,
        prompt: Integer[Array, "batch seq"],
        *,
        max_new_tokens: int,
        prompt_lengths: Integer[Array, " batch"] | None = None,
        temperature: float | Float[Array, " batch"] = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] = (),
        key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
        cache: bool = True,
    ) -> Iterator[Integer[Array, " batch"]]:
        """Continue each prompt as `generate` does, and yield the tokens one by one.

        A step yields one token for each sequence, and a zero for a sequence that has
        ended. When all have ended, so does the iterator. The parameters are those that
        the model has at the first step.

        Args:
            prompt: As in `generate`, like all arguments.
            max_new_tokens: The largest number of steps.
            prompt_lengths: The length of each prompt.
            temperature: The number that divides the logits.
            top_k: The number of likeliest tokens.
            top_p: The probability of the likeliest tokens.
            min_p: The least probability, relative to the largest.
            repetition_penalty: The factor of logits of earlier tokens.
            stop_tokens: Tokens that end a sequence.
            key: A random key.
            cache: Keep keys and values.

        Returns:
            An iterator of the new tokens (batch,) in int32.

        Raises:
            TypeError: As in `generate`, before the first step.
            ValueError: As in `generate`, before the first step.
        """
        given = self._read_prompt(
            "TransformerLM.stream",
            prompt,
            key,
            cache,
            max_new_tokens,
            prompt_lengths,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_tokens=stop_tokens,
        )
        return stream(self, *given)

    def _read_prompt(
        self, op, prompt, key, cache, max_new_tokens, lengths, **sampling
    ) -> tuple[Any, ...]:
        """Return the checked arguments of `generate`, and the places for a prompt."""
        (count,) = check_arguments(op, None, max_new_tokens=max_new_tokens)
        check_flag(op, cache=cache)
        self._check_tokens(op, "prompt", prompt)
        options, top_k = check_sampling(
            op, prompt.shape[0], self.vocab_size, key, **sampling
        )
        seq = prompt.shape[1]
        check_length(op, "prompt and max_new_tokens", seq + count, self.context_length)
        if cache and self.why_no_cache is not None:
            raise ValueError(f"{op}: {self.why_no_cache}")
        if lengths is not None:
            lengths = read_lengths(op, "prompt_lengths", lengths, "prompt", prompt)
        prompt = read_tokens(op, "prompt", prompt, self.vocab_size, lengths)
        size = seq
        if cache and self.any_length:
            power = 1 << max(seq - 1, LEAST_PLACES - 1).bit_length()
            size = min(power, self.context_length - count)
        return prompt, lengths, options, top_k, count, cache, size
