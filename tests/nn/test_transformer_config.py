"""The architecture of the language model as data."""

import inspect
from dataclasses import MISSING, fields, replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import untyped

from jaxkern import RotaryScaling
from jaxkern.nn import TransformerConfig, TransformerLM

SIZES: dict[str, Any] = {"embed_dim": 8, "num_layers": 2, "num_heads": 2}
SIZES |= {"hidden_dim": 12}


def abstract(make, *args, **options) -> Any:
    """Return the model that a call would make, with shapes in place of arrays."""
    return nnx.eval_shape(lambda: make(*args, **options, rngs=nnx.Rngs(0)))


def test_the_constructor_has_the_fields_and_their_defaults():
    _, *arguments = inspect.signature(TransformerLM.__init__).parameters.items()
    own = {field.name: field for field in fields(TransformerConfig)}
    assert [name for name, _ in arguments][: len(own)] == [*own]
    for name, field in own.items():
        given = dict(arguments)[name].default
        assert field.default == (MISSING if given is inspect.Parameter.empty else given)


def test_a_config_makes_the_model_that_its_arguments_make():
    options = SIZES | {"norm": "layer", "window": 4, "mlp_bias": True}
    model = abstract(TransformerLM, 16, 8, **options, scan_layers=False)
    config = TransformerConfig(16, 8, **options)
    assert model.config == config and hash(model.config) == hash(config)
    other = abstract(TransformerLM.from_config, config, scan_layers=False)
    assert nnx.split(other)[0] == nnx.split(model)[0]
    assert jax.tree.map(np.shape, nnx.split(other)[1]) == jax.tree.map(
        np.shape, nnx.split(model)[1]
    )
    wider = abstract(TransformerLM.from_config, replace(config, hidden_dim=20))
    assert wider.layers.mlp.w_up.shape == (2, 8, 20)


@pytest.mark.usefixtures("unchecked_types")
def test_numbers_of_numpy_become_numbers_of_python():
    sizes = {name: np.int8(size) for name, size in SIZES.items()}
    config: Any = untyped.nn.TransformerConfig(
        np.int64(16), 8, **sizes, norm_epsilon=np.float32(0.5), rope_theta=100
    )
    assert config == TransformerConfig(16, 8, **SIZES, norm_epsilon=0.5, rope_theta=1e2)
    assert {type(config.embed_dim), type(config.vocab_size)} == {int}
    assert {type(config.norm_epsilon), type(config.rope_theta)} == {float}


@pytest.mark.usefixtures("unchecked_types")
def test_refusals():
    scaling: Any = RotaryScaling(
        "longrope", 2.0, original_context_length=8, factors=[1]
    )
    with pytest.raises(ValueError, match="TransformerLM: num_heads must divide embed_"):
        untyped.nn.TransformerConfig(16, 8, **SIZES | {"num_heads": 3})
    with pytest.raises(ValueError, match="rope_scaling must have 2 factors, .* got 1"):
        untyped.nn.TransformerConfig(16, 8, **SIZES, rope_scaling=scaling)
    with pytest.raises(TypeError, match="config must be a TransformerConfig, got dict"):
        untyped.nn.TransformerLM.from_config(SIZES, rngs=nnx.Rngs(0))
