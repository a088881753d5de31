"""Generation with `TransformerLM`, and the layer `MultiHeadMLP`."""

from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_near, normal, untyped

from jaxkern import Dilation, dilated_attention
from jaxkern.nn import (
    FlashMLP,
    LowRankSwiGLU,
    MultiHeadAttention,
    MultiHeadMLP,
    TransformerLM,
)
from jaxkern.nn._generate import (
    Sampling,
    _choose,
    _Chosen,
    _generate,
    _go_on,
    _keep_top,
    _sample,
    check_sampling,
)

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
    model = build(num_kv_heads=2)
    tokens = jax.random.randint(jax.random.key(1), (2, 11), 0, VOCAB)
    expected = nnx.jit(TransformerLM.features)(model, tokens)
    cache = model.make_cache(2, 13)
    got, extend = [], nnx.jit(TransformerLM.extend)
    for part in jnp.split(tokens, [5, 6], axis=1):
        features, cache = extend(model, part, cache)
        got.append(features)
    assert_near(jnp.concatenate(got, axis=1), expected)
    assert cache.length == 11 and cache.keys.shape == (2, 2, 13, 2, 6)
    assert not np.any(cache.values[:, :, 11:])


@pytest.mark.usefixtures("promoting")
def test_bfloat16_cache():
    model = build(dtype=jnp.bfloat16)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, VOCAB)
    extend, whole = nnx.jit(TransformerLM.extend), nnx.jit(TransformerLM.features)
    features, cache = extend(model, tokens, model.make_cache(2, 8))
    assert cache.keys.dtype == features.dtype == jnp.bfloat16
    assert_near(features, whole(model, tokens), 0.02)


@pytest.mark.parametrize(
    "options, cache",
    [({"num_kv_heads": 2}, True), ({"attention_fn": dilated}, False)],
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
    whole = run(PROMPT)
    for i, (row, length) in enumerate(zip(got, lengths, strict=True)):
        alone = whole[i] if length == 4 else run(PROMPT[i, None, :length])[0]
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


def test_another_attention_without_a_cache():
    model = build(attention_fn=dilated)
    tokens = model.generate(PROMPT, max_new_tokens=5, cache=False)
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    np.testing.assert_array_equal(logits[:, 3:-1].argmax(-1), tokens[:, 4:])


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


def test_temperatures_of_each_prompt():
    """Rows at 0 are greedy, and another row is as with its number alone."""
    model, key = build(), jax.random.key(3)
    run: Any = partial(model.generate, PROMPT, max_new_tokens=5)
    got = run(temperature=jnp.array([0.0, 0.9, 1e-5]), key=key)
    greedy, warm = run(), run(temperature=0.9, key=key)
    np.testing.assert_array_equal(got[::2], greedy[::2])
    np.testing.assert_array_equal(got[1], warm[1])
    assert not np.array_equal(warm[1], greedy[1])


def test_top_k_and_min_p():
    """Of 200 samples, all are among the tokens that stay, and each of these is."""
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


def test_a_cache_can_be_donated():
    model = build()
    extend = jax.jit(TransformerLM.extend, donate_argnums=2)
    cache = model.make_cache(3, 8)
    features, longer = extend(model, PROMPT, cache)
    assert cache.keys.is_deleted() and cache.values.is_deleted()
    assert longer.length == 4 and np.isfinite(features).all()


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


def test_compiles_once():
    model = build()
    options: Any = {"max_new_tokens": 5, "temperature": 1.0}
    model.generate(PROMPT, key=jax.random.key(0), **options)
    # A second trace would call this.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerLM, "extend", None)
        again = options | {"temperature": 0.5, "top_p": 0.8}
        model.generate(PROMPT, key=jax.random.key(1), **again)


def generate(prompt=PROMPT, **options):
    arguments = {"max_new_tokens": 2} | options

    def call():
        attention_fn = dilated if arguments.pop("dilated", False) else None
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
            generate(dilated=True),
            ValueError,
            "attention_fn must be None for a cache, got one; generate.cache=False",
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
        (
            lambda: untyped.nn.MultiHeadMLP(24, 40, num_heads=5, rngs=nnx.Rngs(0)),
            ValueError,
            "MultiHeadMLP: num_heads must divide embed_dim=24, got 5",
        ),
        (
            lambda: untyped.nn.MultiHeadMLP(24, 0, num_heads=4, rngs=nnx.Rngs(0)),
            ValueError,
            "hidden_dim must be an integer of at least 1, got 0",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_multi_head_mlp(gated):
    module = MultiHeadMLP(24, 10, num_heads=4, gated=gated, rngs=nnx.Rngs(0))
    heads: Any = FlashMLP(4, 6, hidden_dim=10, gated=gated, rngs=nnx.Rngs(1))
    nnx.update(heads, nnx.state(module.heads))
    x = normal(0, (2, 3, 24))
    by_head = jnp.einsum("btd,dhe->hbte", x, module.w_in.kernel[...])
    by_head = heads(by_head.reshape(4, 6, 6)).reshape(4, 2, 3, 6)
    expected = jnp.einsum("hbte,hed->btd", by_head, module.w_out.kernel[...])
    assert_near(nnx.jit(lambda m, x: m(x))(module, x), expected)
    assert module(x[0, 0]).shape == (24,)
    size = sum(p.size for p in jax.tree.leaves(nnx.state(module.heads)))
    assert size == (3 if gated else 2) * 24 * 10


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
