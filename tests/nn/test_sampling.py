"""How `TransformerLM.generate` chooses a token, and when it stops."""

from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import normal

from jaxkern.nn import TransformerLM
from jaxkern.nn._generate import (
    Sampling,
    _choose,
    _Chosen,
    _go_on,
    _keep_top,
    _sample,
    check_sampling,
)

VOCAB = 50


def build() -> Any:
    """Return a model with logits so large that it does not just repeat a token."""
    sizes: Any = {"embed_dim": 24, "num_layers": 2, "num_heads": 4, "hidden_dim": 40}
    model = TransformerLM(VOCAB, 16, **sizes, rngs=nnx.Rngs(0))
    assert model.head is not None
    model.head[...] *= 4
    return model


PROMPT = jax.random.randint(jax.random.key(0), (3, 4), 0, VOCAB)


def test_repetition_penalty():
    """A penalty of 1e9 forbids all tokens of the prompt and those that were new."""
    model, lengths = build(), jnp.array([2, 4, 1])
    run: Any = partial(model.generate, PROMPT, max_new_tokens=5, prompt_lengths=lengths)
    got = np.asarray(run(repetition_penalty=1e9))
    for row, length in zip(got, [2, 4, 1], strict=True):
        new = row[length : length + 5]
        assert len({*new.tolist()}) == 5 and not set(new) & set(row[:length])
    logits = jnp.array([[3.0, -2.0, 1.0, 0.5]])
    seen = jnp.array([[True, True, False, False]])
    chosen = _Chosen(jnp.zeros((1, 1), int), jnp.int32(0), jnp.zeros(1, bool), seen)
    sampling = Sampling(None, 0.0, 1.0, 0.0, 2.0, None)
    for first, expected in [(3.0, 0), (1.9, 2), (-2.0, 2)]:
        changed = logits.at[0, 0].set(first)
        token, after = _choose(changed, chosen, sampling=sampling, top_k=None)
        assert token[0] == expected
        assert after.seen is not None and after.seen[0, expected]


def test_a_token_of_padding_is_not_repeated():
    """Zeros replace what follows a shorter prompt, and 0 stays the likeliest token."""

    class Constant:
        vocab_size = 4

        def features(self, tokens):
            return tokens[..., None]

        def logits(self, features):
            return jnp.tile(jnp.array([[3.0, 2.0, 1.0, 0.5]]), (len(features), 1))

    sampling = Sampling(None, 0.0, 1.0, 0.0, 1e9, None)
    prompt, lengths = jnp.array([[1, 2], [1, 0]]), jnp.array([1, 2])
    got = _go_on(Constant(), prompt, lengths, sampling, None, 2, False)
    np.testing.assert_array_equal(got, [[1, 0, 2, 0], [1, 0, 2, 3]])


def test_nothing_is_computed_once_all_sequences_have_stopped():
    tokens, seen = jnp.zeros((2, 3), int), None
    for number, stopped, expected in [
        (0, [False, False], True),
        (1, [True, False], True),
        (1, [True, True], False),
        (3, [False, False], False),
    ]:
        chosen = _Chosen(tokens, jnp.int32(number), jnp.array(stopped), seen)
        assert bool(chosen.go_on()) == expected


def test_top_k_and_min_p():
    """All of 200 samples are among the tokens that stay, and each of these is drawn."""
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]))
    for options, top_k, kept in [
        ({}, 1, [{1}, {0, 1, 2, 3}]),
        ({}, 3, [{1, 2, 3}, {0, 1, 2, 3}]),
        ({"min_p": 0.6}, None, [{1, 2}, {0, 1, 2, 3}]),
        ({"min_p": 1.0}, None, [{1}, {0, 1, 2, 3}]),
        ({"min_p": 0.4}, 2, [{1, 2}, {0, 1, 2, 3}]),
        ({"top_p": 0.7}, 3, [{1, 2}, {0, 1, 2, 3}]),
        ({"top_p": 0.95}, 3, [{1, 2, 3}, {0, 1, 2, 3}]),
    ]:
        plain = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": None}
        sampling = Sampling(jax.random.key(0), 1.0, **plain | options, stop_tokens=None)
        sample: Any = jax.vmap(lambda i, s=sampling, k=top_k: _sample(logits, s, k, i))
        got = np.asarray(sample(jnp.arange(200)))
        assert [set(row) for row in got.T.tolist()] == kept
    # A `top_k` above the size of the vocabulary samples from all tokens.
    options = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "stop_tokens": ()}
    options |= {"top_k": 5, "repetition_penalty": 1.0}
    assert check_sampling("op", 2, 4, None, **options)[1] == 4


def test_sampled_frequencies():
    model, many = build(), jnp.tile(PROMPT[:1], (4000, 1))
    options: Any = {"max_new_tokens": 1, "temperature": 2.0, "key": jax.random.key(0)}
    got = Counter(np.asarray(model.generate(many, **options))[:, -1].tolist())
    p = np.asarray(jax.nn.softmax(model(PROMPT[:1])[0, -1] / 2))
    for token in range(VOCAB):
        spread = (4000 * p[token] * (1 - p[token])) ** 0.5
        assert abs(got[token] - 4000 * p[token]) < 4 * spread + 1


def test_top_p():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]))
    for top_p, kept in [(0.39, 1), (0.41, 2), (0.75, 3), (0.95, 4), (1.0, 4)]:
        one, equal = np.isfinite(_keep_top(logits, top_p))
        assert one.sum() == kept and one[1]
        # Tokens that are as likely as the last one that is needed stay.
        assert equal.all()
    # The probabilities of the likelier tokens add up to top_p exactly.
    halves = jnp.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]])
    for top_p, kept in [(0.25, 1), (0.5, 1), (0.75, 2), (0.875, 3), (0.9375, 5)]:
        assert np.isfinite(_keep_top(jnp.log(halves), top_p)).sum() == kept
    # A sum in float32 loses the last of so many probabilities.
    many = 3 * normal(0, (1, 131072))
    assert np.isfinite(_keep_top(many, 1.0)).all()
    weights = np.exp(-np.sort(-np.asarray(many[0], np.float64)))
    sums = weights.cumsum() / weights.sum()
    for top_p in (1e-3, 0.3, 0.9, 0.9999, 0.999999):
        kept = np.isfinite(_keep_top(many, top_p)).sum()
        # The margin is the float32 rounding of top_p and of the sums.
        low, high = (np.searchsorted(sums, top_p + d) for d in (-1e-6, 1e-6))
        assert low <= kept <= high + 1


def test_temperatures_of_each_prompt():
    """Rows at 0 are greedy, and another row is as with its number alone."""
    model, key = build(), jax.random.key(3)
    run: Any = partial(model.generate, PROMPT, max_new_tokens=5)
    got = run(temperature=jnp.array([0.0, 0.9, 1e-5]), key=key)
    greedy, warm = run(), run(temperature=0.9, key=key)
    np.testing.assert_array_equal(got[::2], greedy[::2])
    np.testing.assert_array_equal(got[1], warm[1])
    assert not np.array_equal(warm[1], greedy[1])
