from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import untyped

KEY = jax.random.key(0)
X = jnp.ones((2, 8))
KEYS = jax.random.split(KEY)
WITH_KEY: dict[str, Any] = {"key": KEY}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "name, options, message",
    [
        ("straight_through", {"derivative": "tanh"}, "derivative must be one of 'id"),
        ("straight_through", {"clip": 0.0}, "clip must be positive, got 0.0"),
        ("reinmax", {"temperature": 0.5}, "temperature must be at least 1, got 0.5"),
        (
            "reinmax_categorical",
            WITH_KEY | {"temperature": 0.99},
            "temperature must be at least 1, got 0.99",
        ),
        (
            "binary_concrete",
            WITH_KEY | {"temperature": -1},
            "temperature must be positive, got -1",
        ),
        (
            "gumbel_softmax",
            WITH_KEY | {"temperature": float("nan")},
            "temperature must be positive, got nan",
        ),
        ("gumbel_softmax", WITH_KEY | {"axis": 2}, r"axis must be in \[-2, 2\), got 2"),
        (
            "gumbel_softmax",
            WITH_KEY | {"axis": 0, "logits": jnp.ones((0, 3))},
            r"logits must have a class on axis 0, got \(0, 3\)",
        ),
        (
            "reinmax_categorical",
            WITH_KEY | {"logits": jnp.ones(())},
            r"logits must have shape \(..., features\) .*, got \(\)",
        ),
    ],
)
def test_values_that_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        getattr(untyped, name)(**{"logits": X} | options)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "name, options, message",
    [
        ("straight_through", {"clip": "1"}, "clip must be one number, got '1'"),
        ("straight_through", {"logits": X.astype(int)}, "logits must have a floating-"),
        ("reinmax", {"logits": [1.0]}, "logits must be an array, got list"),
        (
            "reinmax",
            {"temperature": X},
            "temperature must be .*, got float32",
        ),
        ("reinmax", {"key": KEYS}, r"key must be a key, .*, got key<fry>\(2,\)"),
        ("binary_concrete", {"key": None}, "key must be a key, as from .*, got None"),
        ("gumbel_softmax", {"key": X}, r"key must be a key, .*, got float32\(2, 8\)"),
        ("reinmax_categorical", {"key": 3}, "key must be a key, .*, got 3"),
    ],
)
def test_types_that_are_refused(name, options, message):
    with pytest.raises(TypeError, match=f"{name}: {message}"):
        getattr(untyped, name)(**{"logits": X} | options)
