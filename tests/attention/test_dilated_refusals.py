from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import untyped

from jaxkern import Dilation, dilated_attention

X = jnp.ones((2, 8, 4, 4))
OK = Dilation([4, 8], [1, 2])


@pytest.mark.parametrize(
    "dilation, uncovered",
    [
        (OK, None),
        # Each pattern takes one row of every pair.
        (Dilation([8, 8], [2, 2], head_offsets="pattern"), None),
        # Head 0 takes the multiples of 2 and of 3, and head 1 the rows after them.
        (Dilation([8, 8], [2, 3]), "row 0 of head 1"),
        (replace(OK, head_groups=True), "row 0 of head 3"),
    ],
)
def test_uncovered_rows_are_an_error_on_request(dilation, uncovered):
    dilation = replace(dilation, uncovered="error")
    run = partial(dilated_attention, dilation=dilation)
    if uncovered is None:
        assert jax.eval_shape(run, X, X, X).shape == X.shape
    else:
        with pytest.raises(ValueError, match=f"got {uncovered} in none"):
            jax.eval_shape(run, X, X, X)


@pytest.mark.usefixtures("unchecked_types")
def test_equal_dilations_have_one_hash():
    """So that a program is compiled once for all of them."""
    same = untyped.Dilation((np.int64(4), 8), [np.int32(1), 2])
    assert same == OK and hash(same) == hash(OK)
    assert replace(same, stop_gradient_mix=True) != OK


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"dilation_rates": [1]},
            ValueError,
            "dilation_rates must be as many as the 2 segment_lengths, got 1",
        ),
        (
            {"segment_lengths": [2, 3], "dilation_rates": [3, 4]},
            ValueError,
            r"must not all exceed their segment_lengths \(2, 3\), got \(3, 4\)",
        ),
        (
            {"segment_lengths": [4, 0]},
            ValueError,
            r"segment_lengths\[1\] must be an integer of at least 1, got 0",
        ),
        (
            {"dilation_rates": [True, 2]},
            ValueError,
            r"dilation_rates\[0\] must be an integer of at least 1, got True",
        ),
        (
            {"segment_lengths": []},
            TypeError,
            r"segment_lengths must be a sequence of integers, got \[\]",
        ),
        ({"segment_lengths": 8}, TypeError, "must be a sequence of integers, got 8"),
        (
            {"head_offsets": "none"},
            ValueError,
            "head_offsets must be one of 'paper', 'blocks', 'pattern', got 'none'",
        ),
        (
            {"uncovered": "nan"},
            ValueError,
            "uncovered must be one of 'zero', 'error', got 'nan'",
        ),
    ],
)
def test_dilations_that_are_refused(changes, error, message):
    options: Any = {"segment_lengths": [4, 8], "dilation_rates": [1, 2]} | changes
    with pytest.raises(error, match=f"^Dilation: .*{message}"):
        untyped.Dilation(**options)


REFUSALS: list[Any] = [
    (
        {"dilation": [1, 2]},
        TypeError,
        r"dilation must be a Dilation, such as .*, got list",
    ),
    (
        {"dilation": Dilation([8] * 5, [1] * 5, head_groups=True)},
        ValueError,
        "heads of query must be at least the 5 patterns for head_groups, got 4",
    ),
    ({"key_mask": X}, TypeError, "key_mask must be a boolean array, got float32"),
    ({"key_mask": [True]}, TypeError, "key_mask must be an array, got list"),
    (
        {"key_mask": X[..., 0] > 0},
        ValueError,
        r"must have shape \(2, 8\), got \(2, 8, 4\)",
    ),
    ({"key": X[:, :4], "value": X[:, :4]}, ValueError, r"key must have shape \(2, 8, "),
    ({"key": X[:, :, :3], "value": X[:, :, :3]}, ValueError, "heads of .* 4.* 3"),
    (
        {"value": X.astype(jnp.bfloat16)},
        TypeError,
        "value must have the dtype of query, float32",
    ),
    (
        {"implementation": "mosaic_gpu"},
        NotImplementedError,
        "dtype must be bfloat16 or float16 for mosaic_gpu, got float32",
    ),
    (
        {"implementation": "cuda"},
        ValueError,
        "implementation must be one of None, 'xla'",
    ),
]


@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
@pytest.mark.parametrize(
    "options, error, message", REFUSALS, ids=[m for *_, m in REFUSALS]
)
def test_refusals(options, error, message):
    options = {"query": X, "key": X, "value": X, "dilation": OK} | options
    with pytest.raises(error, match=f"dilated_attention: .*{message}"):
        untyped.dilated_attention(**options)
