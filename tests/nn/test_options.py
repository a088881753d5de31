"""Each option of the language model changes its program, or is refused."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkern import RotaryScaling, attention
from jaxkern.nn import LowRankSwiGLU, TransformerLM, make_mesh

SIZES: dict[str, Any] = {
    "vocab_size": 10,
    "context_length": 6,
    "embed_dim": 8,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 12,
}
TOKENS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
CAPPED: dict[str, Any] = {"window": 2, "full_attention_every": 2}
# Another value of each option, beside the options without which it is refused.
FLIPPED: dict[str, Any] = {
    "vocab_size": 11,
    "context_length": None,  # only a bound, see `test_generate.py`
    "embed_dim": 4,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 16,
    "rope_theta": 100.0,
    "num_kv_heads": 1,
    "tie_embeddings": True,
    "head_dim": 2,
    "norm": "layer",
    "norm_epsilon": 0.1,
    "norm_placement": "post",
    "qk_norm": "head",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "activation": "gelu",
    "gated_mlp": False,
    "rope_pairs": "halves",
    "rotary_dim": 2,
    "rope_scaling": RotaryScaling("linear", 2.0),
    "local_rope_theta": (CAPPED, 100.0),
    "embedding_scale": 2.0,
    "attention_scale": 0.3,
    "attention_softcap": 1.0,
    "attention_sinks": True,
    "logit_softcap": 1.0,
    "window": 2,
    "full_attention_every": ({"window": 2}, 2),
    "attention_fn": partial(attention, scale=0.3),
    "mlp": partial(LowRankSwiGLU, rank=2),
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.bfloat16,
    "remat": True,
    "scan_layers": False,
    "mesh": "a mesh",
    "rngs": None,  # the values of the parameters, see `test_transformer.py`
}
LOSS: dict[str, Any] = {
    "where": TOKENS > 2,
    "ignore_index": 3,
    "z_loss": 0.1,
    "label_smoothing": 0.1,
    "softcap": 1.0,
    "return_lse": True,
    "positions": jnp.arange(4) + 1,
    "segment_ids": TOKENS // 3,
    "chunk": 4,
}
# So many samples that no option leaves all of them as they are.
ROWS = jnp.tile(TOKENS[:1], (40, 1))
GENERATE: dict[str, Any] = {
    "max_new_tokens": 1,
    "prompt_lengths": jnp.full(40, 2),
    "temperature": 0.5,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.9,
    "repetition_penalty": 9.0,
    "stop_tokens": [*range(5)],
    "key": jax.random.key(1),
    "cache": False,
}


def build(**options) -> Any:
    given: dict[str, Any] = SIZES | {"rngs": nnx.Rngs(0)} | options
    return TransformerLM(**given)


def program(run, *args) -> list[Any]:
    """Return what `run` computes, with its constants, without compiling it."""
    jaxpr = jax.make_jaxpr(run)(*args)
    return [str(jaxpr), *(np.asarray(x).tobytes() for x in jaxpr.consts)]


def loss_program(model, **options):
    graph, state = nnx.split(model)

    def loss(state):
        return nnx.merge(graph, state).loss(TOKENS, TOKENS, **options)

    return program(loss, state)


def names_of(function) -> set[str]:
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    given = inspect.signature(function).parameters
    return {name for name, x in given.items() if x.kind not in kinds} - {"self"}


@pytest.mark.usefixtures("promoting")
def test_options_of_the_model():
    assert names_of(TransformerLM.__init__) == FLIPPED.keys()
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    seen = {}
    for name, value in FLIPPED.items():
        beside, value = value if isinstance(value, tuple) else ({}, value)
        if value is None:
            continue
        value = mesh if name == "mesh" else value
        key = tuple(beside)
        if key not in seen:
            seen[key] = loss_program(nnx.eval_shape(lambda b=beside: build(**b)))
        options = beside | {name: value}
        got = loss_program(nnx.eval_shape(lambda o=options: build(**o)))
        assert got != seen[key], name


def test_options_of_the_loss():
    assert names_of(TransformerLM.loss) == LOSS.keys() | {"tokens", "targets"}
    model = nnx.eval_shape(build)
    expected = loss_program(model)
    for name, value in LOSS.items():
        assert loss_program(model, **{name: value}) != expected, name


def test_options_of_generation():
    assert names_of(TransformerLM.generate) == GENERATE.keys() | {"prompt"}
    streamed, generated = (
        [(x.name, x.kind, x.default) for x in inspect.signature(f).parameters.values()]
        for f in (TransformerLM.stream, TransformerLM.generate)
    )
    assert streamed == generated
    plain: dict[str, Any] = {"max_new_tokens": 2, "temperature": 5.0}
    run = partial(build().generate, ROWS, **plain | {"key": jax.random.key(0)})
    expected = run()
    for name, value in GENERATE.items():
        if name != "cache":
            assert not np.array_equal(run(**{name: value}), expected), name
    # Without a cache the tokens are the same, but not their program.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerLM, "extend", None)
        np.testing.assert_array_equal(run(cache=False), expected)
