"""Generation with `TransformerLM`, with a cache, in steps and without."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_near

from jaxkern import Dilation, attention, dilated_attention, ring_attention
from jaxkern.nn import (
    LowRankSwiGLU,
    MultiHeadAttention,
    TransformerLM,
)
from jaxkern.nn._generate import _generate

VOCAB, CONTEXT = 50, 16
dilated = partial(dilated_attention, dilation=Dilation((8, 16), (1, 2)))
SIZES: dict[str, Any] = {
    "embed_dim": 24,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 40,
}


def build(**options) -> Any:
    """Return a model with logits so large that it does not just repeat a token."""
    model = TransformerLM(VOCAB, CONTEXT, **SIZES, rngs=nnx.Rngs(0), **options)
    assert model.head is not None
    model.head[...] *= 4
    return model


PROMPT = jax.random.randint(jax.random.key(0), (3, 4), 0, VOCAB)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2, "scan_layers": False}],
    ids=["scan", "unrolled, two heads a key"],
)
def test_greedy_equals_the_whole_forward_token_by_token(options):
    model = build(**options)
    forward = nnx.jit(lambda model, tokens: model(tokens).argmax(-1))
    # No token sees a later one, so one padded shape is enough for all lengths.
    expected = jnp.pad(PROMPT, ((0, 0), (0, 5)))
    for i in range(4, 9):
        token = forward(model, expected)[:, i - 1]
        expected = expected.at[:, i].set(token)
    for cache in (True, False):
        got = model.generate(PROMPT, max_new_tokens=5, cache=cache)
        assert got.dtype == PROMPT.dtype
        np.testing.assert_array_equal(got, expected)


def test_features_with_a_cache_equal_those_without():
    """A layer with a window keeps the keys of the window only."""
    model = build(num_kv_heads=2, window=4, full_attention_every=2)
    tokens = jax.random.randint(jax.random.key(1), (2, 11), 0, VOCAB)
    expected = nnx.jit(TransformerLM.features)(model, tokens)
    cache = model.make_cache(2, 13)
    extend: Any = nnx.jit(TransformerLM.extend)
    got = []
    for part in jnp.split(tokens, [5, 6], axis=1):
        features, cache = extend(model, part, cache)
        got.append(features)
    assert_near(jnp.concatenate(got, axis=1), expected)
    assert cache.length == 11 and cache.keys.shape == (1, 2, 13, 2, 6)
    assert not np.any(cache.values[:, :, 11:])
    assert cache.window_keys.shape == cache.window_values.shape == (1, 2, 4, 2, 6)
    # Rows of 2 and 5 tokens, and then of 5 and 1; the padding are no tokens.
    cache, at = model.make_cache(2, 13), np.zeros(2, int)
    for lengths in ([2, 5], [5, 1]):
        read = np.arange(5)[None] < np.array(lengths)[:, None]
        part = np.stack([row[i : i + 5] for row, i in zip(tokens, at, strict=True)])
        part = jnp.asarray(np.where(read, part, -1))
        features, cache = extend(model, part, cache, jnp.array(lengths))
        for row, whole, i, count in zip(features, expected, at, lengths, strict=True):
            assert_near(row[:count], whole[i : i + count])
        at = at + lengths
    np.testing.assert_array_equal(cache.length, [7, 6])


def test_a_window_needs_no_capacity():
    """With a window in all layers only the window is kept, up to context_length."""
    model = build(window=3)
    cache = model.make_cache(3, 4)
    assert cache.keys is None and cache.window_keys.shape == (2, 3, 3, 4, 6)
    features, cache = model.extend(jnp.tile(PROMPT, (1, 2)), cache)
    assert_near(features, model.features(jnp.tile(PROMPT, (1, 2))))
    with pytest.raises(ValueError, match="at most context_length=16 tokens, got 17"):
        model.extend(jnp.zeros((3, 9), int), cache)
    with pytest.raises(ValueError, match="must be at most capacity=2 tokens, got 4"):
        model.extend(PROMPT, model.make_cache(3, 2))


@pytest.mark.usefixtures("promoting")
def test_bfloat16_cache():
    model = build(dtype=jnp.bfloat16)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, VOCAB)
    extend: Any = nnx.jit(TransformerLM.extend)
    whole = nnx.jit(TransformerLM.features)
    features, cache = extend(model, tokens, model.make_cache(2, 8))
    assert cache.keys.dtype == features.dtype == jnp.bfloat16
    assert_near(features, whole(model, tokens), 0.02)


@pytest.mark.parametrize(
    "options, cache",
    [({"num_kv_heads": 2, "window": 3}, True), ({"attention_fn": dilated}, False)],
    ids=["cache", "dilated, no cache"],
)
def test_prompts_of_unequal_length_are_as_alone(options, cache):
    """Padding has no influence, and zeros follow the last new token of a row."""
    model, lengths = build(**options), [2, 4, 1]
    # Without this, a token would hardly depend on the tokens before it.
    weights = nnx.state(model.layers, nnx.Param)
    nnx.update(model.layers, jax.tree.map(lambda x: 3 * x, weights))
    run: Any = partial(model.generate, max_new_tokens=5, cache=cache)
    got = run(PROMPT, prompt_lengths=jnp.array(lengths))
    assert got.shape == (3, 9) and got.dtype == PROMPT.dtype
    # With a cache a prompt alone is padded, too, so it is compared with one without.
    plain: Any = partial(run, cache=False)
    whole = plain(PROMPT)
    for i, (row, length) in enumerate(zip(got, lengths, strict=True)):
        alone = whole[i] if length == 4 else plain(PROMPT[i, None, :length])[0]
        np.testing.assert_array_equal(row[: length + 5], alone)
        assert not np.any(row[length + 5 :])
    for padding in (7, -1, VOCAB, 2**31 - 1):
        read = jnp.arange(4)[None] < jnp.array(lengths)[:, None]
        padded = jnp.where(read, PROMPT, padding)
        again = run(padded, prompt_lengths=jnp.array(lengths))
        np.testing.assert_array_equal(again, got)
    # Tokens that are not padding are checked.
    with pytest.raises(ValueError, match="prompt must be from 0 to 49, got -1"):
        run(padded.at[0, 1].set(-1), prompt_lengths=jnp.array(lengths))
    traced = jax.jit(lambda *args: run(args[0], prompt_lengths=args[1]))
    np.testing.assert_array_equal(traced(padded, jnp.array(lengths)), got)
    equal = run(PROMPT, prompt_lengths=jnp.full(3, 4))
    np.testing.assert_array_equal(equal, whole)


def test_samples_of_prompts_of_unequal_length():
    model, lengths = build(), jnp.array([2, 4, 1])
    options: Any = {"max_new_tokens": 5, "prompt_lengths": lengths}
    options |= {"temperature": 1.0, "key": jax.random.key(1)}
    got = model.generate(PROMPT, **options)
    np.testing.assert_array_equal(got, model.generate(PROMPT, cache=False, **options))


@pytest.mark.usefixtures("unchecked_types")
def test_refused_prompt_lengths():
    model = build()
    run: Any = partial(model.generate, PROMPT, max_new_tokens=2)
    with pytest.raises(TypeError, match="prompt_lengths must be an array, got list"):
        run(prompt_lengths=[1, 2, 3])
    with pytest.raises(ValueError, match=r"prompt_lengths must have shape \(3,\) for"):
        run(prompt_lengths=jnp.array([1, 2]))
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"must be from 1 to 4, got {wrong}"):
            run(prompt_lengths=jnp.array([1, 2, wrong]))


@pytest.mark.parametrize(
    "attention_fn, lengths",
    [(attention, None), (dilated, [2, 4, 1])],
    ids=["with a mask", "dilated"],
)
def test_a_cache_for_another_attention(attention_fn, lengths):
    model = build(attention_fn=attention_fn)
    lengths = None if lengths is None else jnp.array(lengths)
    run: Any = partial(model.generate, PROMPT, max_new_tokens=5, prompt_lengths=lengths)
    np.testing.assert_array_equal(run(), run(cache=False))


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_a_stream_is_what_generate_returns(cache):
    model, lengths = build(), jnp.array([2, 4, 1])
    options: Any = {"max_new_tokens": 5, "prompt_lengths": lengths, "cache": cache}
    options |= {"temperature": 0.7, "key": jax.random.key(0), "top_k": 20}
    options |= {"repetition_penalty": 1.5}
    got = np.asarray(model.generate(PROMPT, **options))
    steps = list(model.stream(PROMPT, **options))
    assert len(steps) == 5 and all(step.dtype == jnp.int32 for step in steps)
    for row, new, length in zip(got, np.stack(steps, 1), [2, 4, 1], strict=True):
        np.testing.assert_array_equal(row[length : length + 5], new)
    # It ends when all sequences have, and zeros stand for those that end before.
    stops = [int(steps[0][0]), *map(int, steps[1])]
    short = list(model.stream(PROMPT, **options, stop_tokens=stops))
    assert len(short) == 2 and short[1][0] == 0 and steps[1][0] != 0


def test_sampling():
    model, key = build(), jax.random.key(0)
    options: Any = {"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9}
    got = model.generate(PROMPT, key=key, **options)
    same = model.generate(PROMPT, key=key, cache=False, **options)
    np.testing.assert_array_equal(got, same)
    other = model.generate(PROMPT, key=jax.random.key(1), **options)
    np.testing.assert_array_equal(got[:, :4], other[:, :4])
    assert not np.array_equal(got, other)
    # A low temperature and a small top_p are greedy.
    greedy = model.generate(PROMPT, max_new_tokens=5)
    least = [{"temperature": x} for x in (1e-4, 1e-40, 1e-300)]
    for changed in (*least, {"top_p": 1e-6}, {"top_p": 1e-40}, {"top_p": 1e-300}):
        cold = model.generate(PROMPT, key=key, **options | changed)
        np.testing.assert_array_equal(cold, greedy)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_stop_tokens(cache):
    """Zeros follow the first stop token, and the other sequences go on."""
    model, lengths = build(), jnp.array([2, 4, 1])
    run: Any = partial(model.generate, PROMPT, max_new_tokens=5, cache=cache)
    plain = np.asarray(run(prompt_lengths=lengths))
    stops = [int(plain[0, 3]), int(plain[1, 8])]
    got = np.asarray(run(prompt_lengths=lengths, stop_tokens=stops))
    ends = []
    for row, before, length in zip(got, plain, [2, 4, 1], strict=True):
        hits = np.flatnonzero(np.isin(before[length : length + 5], stops))
        ends.append(int(hits[0]) + 1 if len(hits) else 5)
        np.testing.assert_array_equal(
            row[: length + ends[-1]], before[: length + ends[-1]]
        )
        assert not np.any(row[length + ends[-1] :])
    assert min(ends) < 5 and max(ends) == 5


def test_a_cache_can_be_donated():
    model = build()
    extend = jax.jit(TransformerLM.extend, donate_argnums=2)
    cache = model.make_cache(3, 8)
    features, longer = extend(model, PROMPT, cache)
    assert cache.keys.is_deleted() and cache.values.is_deleted()
    assert longer.length == 4 and np.isfinite(features).all()


def test_compiles_once():
    model = build()
    options: Any = {"max_new_tokens": 5, "temperature": 1.0}
    model.generate(PROMPT, key=jax.random.key(0), **options)
    # A second trace would call this.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerLM, "extend", None)
        again = options | {"temperature": 0.5, "top_p": 0.8}
        model.generate(PROMPT, key=jax.random.key(1), **again)


def test_prompts_of_many_lengths_share_a_program():
    model = build(num_kv_heads=4)
    compiled: Any = _generate
    before = compiled._cache_size()
    for length in (1, 2, 3, 4):
        model.generate(PROMPT[:, :length], max_new_tokens=5)
    lengths = jnp.array([2, 1, 3])
    model.generate(PROMPT[:, :3], max_new_tokens=5, prompt_lengths=lengths)
    assert compiled._cache_size() <= before + 1
    # Another number of places is another program.
    long = jnp.zeros((3, 17), int)
    model.context_length = 64
    model.generate(long, max_new_tokens=5)
    now = compiled._cache_size()
    model.generate(jnp.zeros((3, 32), int), max_new_tokens=5)
    assert compiled._cache_size() == now


def generate(prompt=PROMPT, **options):
    arguments = {"max_new_tokens": 2} | options

    def call():
        attention_fn = arguments.pop("attention_fn", None)
        build(attention_fn=attention_fn).generate(prompt, **arguments)

    return call


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            generate(max_new_tokens=0),
            ValueError,
            "max_new_tokens must be an integer of at least 1, got 0",
        ),
        (
            generate(max_new_tokens=13),
            ValueError,
            "max_new_tokens must be at most context_length=16 tokens, got 17",
        ),
        (
            generate(jnp.full((1, 2), VOCAB)),
            ValueError,
            "generate: prompt must be from 0 to 49, got 50",
        ),
        (
            generate(jnp.zeros((1, 0), int)),
            ValueError,
            r"prompt must have shape \(batch, seq\) and no empty axis, got \(1, 0\)",
        ),
        (
            generate(temperature=-1.0),
            ValueError,
            "temperature must be at least 0, got -1",
        ),
        (
            generate(temperature=float("nan")),
            ValueError,
            "temperature must be finite and at least 0, got nan",
        ),
        (
            generate(temperature=float("inf")),
            ValueError,
            "temperature must be finite, got inf",
        ),
        (
            generate(temperature=1.0, top_p=float("nan"), key=jax.random.key(0)),
            ValueError,
            "top_p must be finite, got nan",
        ),
        (
            generate(temperature=1.0),
            TypeError,
            "key must be a key, as from jax.random.key at a temperature above 0, got N",
        ),
        (
            generate(key=jax.random.key(0)),
            TypeError,
            "key must be None at temperature 0, got one",
        ),
        (
            generate(temperature=1.0, top_p=0.0, key=jax.random.key(0)),
            ValueError,
            "top_p must be above 0 and at most 1, got 0.0",
        ),
        (generate(top_p="0.5"), TypeError, "top_p must be one number, got '0.5'"),
        (generate(cache=1), TypeError, "cache must be True or False, and known when"),
        (generate(top_k=0), ValueError, "top_k must be an integer of at least 1"),
        (generate(min_p=1.5), ValueError, "min_p must be at most 1, got 1.5"),
        (
            generate(repetition_penalty=0.0),
            ValueError,
            "repetition_penalty must be positive, got 0.0",
        ),
        (
            generate(stop_tokens=[VOCAB]),
            ValueError,
            "stop_tokens must be from 0 to 49, got 50",
        ),
        (generate(stop_tokens=3), TypeError, "stop_tokens must be a sequence of tok"),
        (
            generate(temperature=jnp.array([1.0, 2.0])),
            ValueError,
            r"temperature must have shape \(3,\), got \(2,\)",
        ),
        (
            generate(temperature=jnp.array([1.0, -2.0, 0.0])),
            ValueError,
            "temperature must be finite and at least 0, got .*-2",
        ),
        (
            generate(temperature=jnp.ones(3)),
            TypeError,
            "key must be a key, as from jax.random.key for an array of temperatures",
        ),
        (
            generate(attention_fn=partial(ring_attention, axis_name="context")),
            ValueError,
            "generate: attention_fn must have all tokens in one place for a cache, got",
        ),
        (
            lambda: build().stream(PROMPT, max_new_tokens=2, top_p=0.0),
            ValueError,
            "stream: top_p must be above 0 and at most 1, got 0.0",
        ),
        (
            lambda: build().extend(PROMPT, build().make_cache(3, 9), jnp.array([1, 5])),
            ValueError,
            r"extend: lengths must have shape \(3,\) for tokens of shape \(3, 4\)",
        ),
        (
            lambda: build().make_cache(1, 17),
            ValueError,
            "make_cache: capacity must be at most context_length=16 tokens, got 17",
        ),
        (
            lambda: build().extend(PROMPT, build().make_cache(3, 3)),
            ValueError,
            "extend: tokens and cache must be at most capacity=3 tokens, got 4",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("qk_norm", ["head", "embed"])
def test_a_block_with_norms_of_its_own_decodes_as_it_computes(qk_norm):
    model = build(scan_layers=False)
    block = model.layers[1]
    block.attention = MultiHeadAttention(
        24,
        4,
        attention_fn=block.attention.attention_fn,
        use_bias=False,
        qk_norm=qk_norm,
        sub_layer_norm=True,
        norm=nnx.RMSNorm,
        rngs=nnx.Rngs(1),
    )
    for norm in (block.attention.query_norm, block.attention.sub_norm):
        assert isinstance(norm, nnx.RMSNorm) and norm.scale is not None
        norm.scale[...] = 5 * norm.scale[...]
    cache = model.make_cache(3, 4)
    assert_near(model.extend(PROMPT, cache)[0], model.features(PROMPT))
    run: Any = partial(model.generate, PROMPT, max_new_tokens=3)
    np.testing.assert_array_equal(run(), run(cache=False))
    block.attention.attention_fn = dilated
    with pytest.raises(ValueError, match="attention_fn of a block must be the model's"):
        model.extend(PROMPT, cache)


def test_equal_models_share_a_program():
    """Each model is built anew, as when a checkpoint is read."""
    mlp: Any = partial(LowRankSwiGLU, rank=4)
    options: Any = {"max_new_tokens": 2, "cache": False}

    def fresh(**given):
        given = {"attention_fn": partial(dilated), "mlp": mlp} | given
        return build(**given).generate(PROMPT, **options)

    fresh()
    compiled: Any = _generate
    before = compiled._cache_size()
    fresh()
    assert compiled._cache_size() == before
    fresh(num_kv_heads=2)
    assert compiled._cache_size() == before + 1
