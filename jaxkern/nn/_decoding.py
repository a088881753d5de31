"""The language model one token after another, with a cache of keys and values."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key, UInt32

from .._core.checks import as_int32, check_array, check_flag, check_integer
from .._core.sharding import on_automatic_axes
from ._cache import KVCache, places_with_cache
from ._common import check_arguments, known, read_tokens
from ._generate import check_sampling, generate, read_prompt_lengths
from ._layers import run_layers
from ._transformer_forward import Forward, check_length


class Decoding(Forward):
    """A language model's cache, and the continuation of prompts."""

    cache_shape: tuple[int, int, int]
    can_cache: bool

    def make_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache.

        Args:
            batch: The number of sequences.
            capacity: The largest number of tokens of a sequence.

        Returns:
            The cache.

        Raises:
            ValueError: The model has an `attention_fn` of its own, a size is negative
                or not an integer, or `capacity` is 0 or above `context_length`.
        """
        op = "TransformerLM.make_cache"
        if not self.can_cache:
            raise ValueError(
                f"{op}: attention_fn must be None for a cache, got one; "
                "generate(cache=False) needs none"
            )
        batch = check_integer(op, "batch", batch, least=0)
        capacity = check_integer(op, "capacity", capacity)
        check_length(op, "capacity", capacity, self.context_length)
        layers, kv_heads, dim = self.cache_shape
        shape = layers, batch, capacity, kv_heads, dim
        # Two arrays: one array in both fields could not be donated.
        keys, values = jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)
        return KVCache(keys, values, jnp.zeros((), jnp.int32))

    @on_automatic_axes(places_with_cache)
    def extend(
        self, tokens: Integer[Array, "batch seq"], cache: KVCache
    ) -> tuple[Float[Array, "batch seq embed_dim"], KVCache]:
        """Return the features of new tokens behind a cache, and the longer cache.

        Args:
            tokens: The new tokens.
            cache: The keys and values of the tokens before them.

        Returns:
            The features of the new tokens, and the cache with their keys and values.

        Raises:
            TypeError: `tokens` is not an integer array.
            ValueError: A token is out of range, or there are more tokens than the
                capacity; both are checked outside of `jit` only.
        """
        op = "TransformerLM.extend"
        self._check_tokens(op, "tokens", tokens)
        check_array(op, "cache.length", cache.length, "integer")
        lengths, seq = known(cache.length), tokens.shape[1]
        if lengths is not None:
            length, most = int(lengths.max(initial=0)), cache.keys.shape[2]
            check_length(op, "tokens and cache", length + seq, most, "capacity")
        tokens = read_tokens(op, "tokens", tokens, self.vocab_size)
        length = as_int32(cache.length)

        def step(kind, x, layer_and_inputs):
            layer, (keys, values) = layer_and_inputs
            x, *grown = layer.extend(x, keys, values, length, kind)
            return x, grown

        x = self._embed(tokens)
        x, (keys, values) = run_layers(
            self.layers, self.kinds, step, x, (cache.keys, cache.values)
        )
        return self.norm(x), KVCache(keys, values, length + seq)

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

        It compiles once for each shape of `prompt`, number of new tokens and `top_k`.
        The options of sampling apply in the order in which they are listed here, but
        for `repetition_penalty`, which comes first.

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
                range; or `cache` is True and the model has an `attention_fn`.

        References:
            top_k: https://arxiv.org/abs/1805.04833, section 5.3.
            top_p: https://arxiv.org/abs/1904.09751, section 3.1.
            min_p: https://arxiv.org/abs/2407.01082, section 3.2.
            repetition_penalty: CTRL, section 4.1, https://arxiv.org/abs/1909.05858.
                Negative logits are multiplied, as Hugging Face's code does.
        """
        op = "TransformerLM.generate"
        (count,) = check_arguments(op, None, max_new_tokens=max_new_tokens)
        check_flag(op, cache=cache)
        self._check_tokens(op, "prompt", prompt)
        sampling, top_k = check_sampling(
            op,
            prompt.shape[0],
            self.vocab_size,
            key,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_tokens=stop_tokens,
        )
        total = prompt.shape[1] + count
        check_length(op, "prompt and max_new_tokens", total, self.context_length)
        lengths = prompt_lengths
        if lengths is not None:
            lengths = read_prompt_lengths(op, lengths, prompt)
        prompt = read_tokens(op, "prompt", prompt, self.vocab_size, lengths)
        return generate(self, prompt, lengths, sampling, top_k, count, cache)
