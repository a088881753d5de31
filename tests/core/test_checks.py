import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern._core.checks import check_array, check_integer, check_number


@pytest.mark.parametrize("value", [3, np.int32(3), np.uint8(3)], ids=repr)
def test_integers(value):
    got = check_integer("op", "size", value)
    assert got == 3 and type(got) is int
    assert check_integer("op", "size", value, least=3) == 3
    assert check_integer("op", "size", -3, least=None) == -3


@pytest.mark.parametrize(
    "value",
    [0, -1, True, np.True_, 2.0, np.float32(2), math.nan, "2", None, jnp.ones((), int)],
    ids=repr,
)
def test_what_is_no_integer_of_at_least_one(value):
    with pytest.raises(ValueError, match="op: size must be an integer of at least 1, "):
        check_integer("op", "size", value)


def test_a_traced_integer_is_refused():
    with pytest.raises(ValueError, match="op: size must be an integer of at least 0"):
        jax.jit(lambda n: check_integer("op", "size", n, least=0))(3)


NUMBERS = [2, 2.5, np.float32(2.5), np.float64(2.5), np.int8(2)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers(value):
    check_number("op", "scale", value, positive=True, least=2.0)


@pytest.mark.parametrize(
    "value", [True, np.True_, "2", None, 2j, np.ones(()), jnp.ones(())], ids=repr
)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="op: scale must be one number, got "):
        check_number("op", "scale", value)


@pytest.mark.parametrize(
    "value, options, wanted",
    [
        (math.nan, {}, "finite, got nan"),
        (-math.inf, {}, "finite, got -inf"),
        (0.0, {"positive": True}, "positive, got 0.0"),
        (-2, {"positive": True, "least": -1.5}, "positive and at least -1.5, got -2"),
        (math.nan, {"positive": True}, "finite and positive, got nan"),
        (math.nan, {"finite": False, "least": 0.0}, "at least 0, got nan"),
        (np.float32(-1), {"least": 0.0}, "at least 0, got -1.0"),
        (1.5, {"least": 0.0, "most": 1.0}, "at most 1, got 1.5"),
        (math.nan, {"finite": False, "most": 1.0}, "at most 1, got nan"),
    ],
)
def test_numbers_out_of_bounds(value, options, wanted):
    with pytest.raises(ValueError, match=f"^op: scale must be {wanted}$"):
        check_number("op", "scale", value, **options)


def test_an_infinite_number_where_it_may_be_one():
    check_number("op", "scale", math.inf, finite=False, positive=True)


def test_an_array_of_one_number_where_it_may_be_traced():
    check_number("op", "scale", jnp.float32(2), traced=True, positive=True)
    check_number("op", "scale", np.array(2), traced=True, positive=True)
    # The value of a traced number is not known, so it is not checked.
    jax.jit(lambda x: check_number("op", "scale", x, traced=True, positive=True))(-1.0)
    with pytest.raises(ValueError, match="op: scale must be positive, got -2.0"):
        check_number("op", "scale", jnp.float32(-2), traced=True, positive=True)


@pytest.mark.parametrize("value", [jnp.ones(1), jnp.ones((), bool), np.ones((1, 1))])
def test_other_arrays_are_no_number(value):
    with pytest.raises(TypeError, match="op: scale must be one number"):
        check_number("op", "scale", value, traced=True)
    with pytest.raises(TypeError, match="op: scale must be one number"):
        jax.jit(lambda x: check_number("op", "scale", x, traced=True))(value)


def test_arrays():
    for xp in (np, jnp):
        check_array("op", "mask", xp.ones(2, bool), "boolean")
        check_array("op", "ids", xp.ones(2, xp.uint8), "integer")
    jax.jit(lambda x: check_array("op", "ids", x, "integer"))(jnp.arange(3))


@pytest.mark.parametrize(
    "array, kind, wanted",
    [
        ([True], "boolean", "an array, got list"),
        (True, "boolean", "an array, got bool"),
        (np.True_, "boolean", "an array, got bool"),
        (jnp.arange(2), "boolean", "a boolean array, got int32"),
        (jnp.ones(2), "integer", "an integer array, got float32"),
        (np.ones(2, bool), "integer", "an integer array, got bool"),
    ],
)
def test_what_is_no_such_array(array, kind, wanted):
    with pytest.raises(TypeError, match=f"^op: ids must be {wanted}"):
        check_array("op", "ids", array, kind)
