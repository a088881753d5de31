"""The options of `TransformerLM.loss`, and rows that pack several documents."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_near

from jaxkern import attention, block_sparse_attention
from jaxkern.nn import TransformerLM, make_mesh

VOCAB, CONTEXT, SEQ = 50, 16, 12


def build(**options) -> Any:
    sizes: Any = {"embed_dim": 24, "num_layers": 2, "num_heads": 4, "hidden_dim": 40}
    return TransformerLM(VOCAB, CONTEXT, **sizes, **options, rngs=nnx.Rngs(0))


def batch() -> Any:
    ids = jax.random.randint(jax.random.key(0), (2, 2, SEQ), 0, VOCAB)
    return ids[0], ids[1]


def pure(state) -> Any:
    return nnx.to_pure_dict(state)


def test_an_empty_batch_has_no_loss():
    tokens = jnp.zeros((0, 3), int)
    assert nnx.value_and_grad(lambda m: m.loss(tokens, tokens))(build())[0] == 0


def test_tokens_that_do_not_count():
    """Some have the target that is ignored, and others are not where the mean is."""
    model, (tokens, targets) = build(), batch()
    counts = jnp.arange(SEQ)[None] < jnp.array([[SEQ], [5]])
    where = counts.at[1, 9:].set(True)
    options: Any = {"z_loss": 0.1, "label_smoothing": 0.3, "softcap": 2.0}
    graph, state = nnx.split(model)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(state, tokens, targets, where):
        model = nnx.merge(graph, state)
        return model.loss(
            tokens, targets, where=where, ignore_index=-100, return_lse=True, **options
        )

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def plain(state):
        z = 2 * jnp.tanh(nnx.merge(graph, state)(tokens) / 2)
        lse = jax.nn.logsumexp(z, axis=-1)
        target = jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
        losses = lse - 0.7 * target - 0.3 * z.mean(-1) + 0.1 * lse**2
        lse = jnp.where(counts, lse, 0)
        return jnp.where(counts, losses, 0).sum() / (SEQ + 5), lse

    got = run(state, tokens, jnp.where(counts, targets, -100), where)
    assert_near(got, plain(state))
    changed = run(state, tokens.at[1, 5:].set(0), targets, counts)
    assert_near(pure(got[1])["layers"], pure(changed[1])["layers"])
    (nothing, lse), gradients = run(state, tokens, targets, where & False)
    assert nothing == 0 and not np.any(lse) and not np.any(pure(gradients)["head"])


IGNORED = jnp.zeros((2, SEQ), int).at[1, 5:].set(-100)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"targets": [[0, 1]]}, TypeError, "targets must be an array, got list"),
        ({"targets": jnp.zeros((2, SEQ - 1), int)}, ValueError, "targets must have"),
        ({"ignore_index": 1.0}, ValueError, "ignore_index must be an integer, got 1.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0, got -1.0"),
        (
            {"targets": IGNORED, "ignore_index": -1},
            ValueError,
            "targets must be from 0 to 49, got -100",
        ),
        (
            {"targets": IGNORED + VOCAB, "where": IGNORED == 0},
            ValueError,
            "targets must be from 0 to 49, got 50",
        ),
        (
            {"tokens": IGNORED, "targets": IGNORED, "ignore_index": -100},
            ValueError,
            "tokens must be from 0 to 49, got -100",
        ),
        (
            {"positions": jnp.arange(SEQ + 1)},
            ValueError,
            r"positions must have shape \(12,\) or \(2, 12\), got \(13,\)",
        ),
    ],
)
def test_a_loss_refuses_before_it_computes(options, error, message):
    def never(query, key, value):
        raise AssertionError("the attention was called")

    tokens, targets = batch()
    model = build(attention_fn=never)
    with pytest.raises(error, match=f"TransformerLM.loss: {message}"):
        model.loss(**{"tokens": tokens, "targets": targets} | options)


IDS = jnp.array([[4, 4, 4, 4, 4, 9, 9, 9, 9, 0, 0, 0], [0] * 2 + [1] * 9 + [2]])


@nnx.jit
def call(model, tokens, **options):
    return model(tokens, **options)


def test_documents_in_an_attention_of_the_users_own():
    """A function with a mask gets that of the documents, and any other their ids."""
    tokens, _ = batch()
    expected = call(build(), tokens, segment_ids=IDS)
    given = []

    def of_ids(query, key, value, *, segment_ids):
        given.append(segment_ids)
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None]
        return attention(query, key, value, mask=mask, is_causal=True)

    for attention_fn in (attention, of_ids):
        model = build(attention_fn=attention_fn)
        assert_near(call(model, tokens, segment_ids=IDS), expected)
    assert given
    # The mask of a call holds too.
    mask = jnp.ones((1, 1, 1, SEQ), bool).at[..., 2].set(False)
    options: Any = {"segment_ids": IDS, "mask": mask}
    expected = call(build(), tokens, **options)
    assert_near(call(build(attention_fn=attention), tokens, **options), expected)
    moved = call(build(), tokens.at[:, 2].set(0), **options)
    changed = np.flatnonzero(np.abs(moved - expected).max((0, 2)) > 0)
    assert changed.tolist() in ([2], [])


def test_documents_on_a_mesh():
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    tokens, _ = batch()
    got = call(build(mesh=mesh), tokens, segment_ids=IDS)
    assert_near(got, call(build(), tokens, segment_ids=IDS))
    mesh = make_mesh(context=2, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="segment_ids must be None for context=2, wh"):
        build(mesh=mesh)(tokens, segment_ids=IDS)


@pytest.mark.usefixtures("unchecked_types")
def test_refused_documents():
    (tokens, targets), model = batch(), build()
    with pytest.raises(TypeError, match="segment_ids must be an integer array, got fl"):
        model(tokens, segment_ids=IDS / 2)
    with pytest.raises(ValueError, match=r"segment_ids must have shape \(2, 12\), got"):
        model(tokens, segment_ids=IDS[:, 1:])
    with pytest.raises(ValueError, match=r"loss: segment_ids must have .*, got \(2, 1"):
        model.loss(tokens, targets, segment_ids=IDS[:, 2:])
    model = build(attention_fn=block_sparse_attention)
    with pytest.raises(ValueError, match="attention_fn must have an option segm"):
        model.loss(tokens, targets, segment_ids=IDS)
