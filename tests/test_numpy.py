"""Every op takes NumPy's arrays as JAX's, and refuses lists and numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from op_definitions import OPS


def to_numpy(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return np.asarray(x, np.float64 if floating else None)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", OPS)
def test_float64_of_numpy_is_float32(name):
    op, args, *_ = OPS[name]
    got, expected = op(*jax.tree.map(to_numpy, args)), op(*args)
    assert isinstance(got, jax.Array) and got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# Cases that pass their first argument on to the op unchanged.
DIRECT = [name for name, case in OPS.items() if case.args[0].ndim > 2]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", DIRECT)
def test_lists_and_numbers_are_refused(name):
    op, args, *_ = OPS[name]
    for wrong in (np.asarray(args[0]).tolist(), 1.0):
        with pytest.raises(TypeError, match="must be an array, got (list|float)"):
            op(wrong, *args[1:])
