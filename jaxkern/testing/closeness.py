"""Compare results with a definition in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def relative_error(got: Any, exact: Any) -> float:
    r"""Return the largest relative error of a row, over all leaves of two trees.

    $$\max_i \frac{\lVert a_i - b_i \rVert}{\max(\lVert b_i \rVert,\ 10^{-3} \bar b)},
    \quad \bar b^2 = \mathrm{mean}_i \lVert b_i \rVert^2$$

    Rows $a_i$ of `got` and $b_i$ of `exact` are vectors along the last axis, such as
    the result of one token or the weights of one feature. A row that is almost zero is
    measured against a thousandth of $\bar b$, the root mean square of the norms in its
    leaf. Everything is computed in float64, on the GPU if JAX's default device is one.

    Args:
        got: A tree of arrays.
        exact: A tree of arrays with as many leaves, whose shapes broadcast with theirs.

    Returns:
        The error as a Python number; it is NaN if there is a NaN in either tree.

    Raises:
        ValueError: The numbers of leaves differ, or shapes do not broadcast.

    Examples:
        ```python
        import numpy as np
        from jaxkern import testing

        got, exact = np.array([3.0, 4.5]), np.array([3.0, 4.0])
        assert testing.relative_error(got, exact) == 0.1
        ```
    """
    # On a GPU's large results NumPy, which has one thread, would take seconds.
    error = _error_on_device if jax.default_backend() == "gpu" else _error_on_host
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    # np.max and not max(), which may drop a NaN.
    return float(np.max([error(a, b) for a, b in pairs]))


def _error_on_host(a: Any, b: Any) -> float:
    """Return the `relative_error` of one leaf, in NumPy."""
    a, b = (np.atleast_1d(np.asarray(x, np.float64)) for x in (a, b))
    # This takes a tenth of the time of `np.linalg.norm`, which writes all squares to
    # memory.
    norms, errors = (np.sqrt(np.vecdot(x, x)) for x in (b, a - b))
    usual = np.sqrt(np.mean(norms**2))
    norms = np.maximum(norms, max(1e-3 * usual, 1e-30))
    return float(np.max(errors / norms, initial=0.0))


def _error_on_device(a: Any, b: Any) -> float:
    """Return the `relative_error` of one leaf, in one program."""
    with jax.enable_x64(True):
        return float(_worst_row(*(jnp.asarray(x) for x in (a, b))))


@jax.jit
def _worst_row(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = (jnp.atleast_1d(x.astype(jnp.float64)) for x in (a, b))
    norms, errors = (jnp.sqrt((x * x).sum(-1)) for x in (b, a - b))
    usual = jnp.sqrt(jnp.mean(norms**2))
    norms = jnp.maximum(norms, jnp.maximum(1e-3 * usual, 1e-30))
    return jnp.max(errors / norms, initial=0.0)


def assert_as_close(got: Any, plain: Any, exact: Any) -> None:
    r"""Assert that no leaf has more than twice the error of its plain form.

    $$e(\mathrm{got}) \le 2\, e(\mathrm{plain}) + \tfrac12 \epsilon$$

    where $e$ is the `relative_error` against `exact`, and $\epsilon$ is the spacing of
    the dtype at 1. So you need not guess a tolerance: the bound follows from the error
    that the same computation has in jnp, in the same dtype. Half of $\epsilon$, one
    rounding, is always allowed, since on few elements the plain form may be exact by
    chance.

    Args:
        got: A tree of arrays, as computed by a kernel.
        plain: The results of the plain form, in the same dtypes.
        exact: The results in float64.

    Raises:
        AssertionError: A leaf's error is above its bound; or its shape differs from the
            shape of `exact` or `plain`, or its dtype from the dtype of `plain`.
        ValueError: The numbers of leaves differ.

    Examples:
        ```python
        import jax.numpy as jnp
        import numpy as np
        import pytest
        from jaxkern import testing

        x = np.linspace(0, 1, 8)
        plain = jnp.asarray(x, jnp.bfloat16) ** 2
        testing.assert_as_close(plain, plain, x**2)
        with pytest.raises(AssertionError, match="leaf 0: error .* above"):
            testing.assert_as_close(0.9 * plain, plain, x**2)
        ```
    """
    trees = map(jax.tree.leaves, (got, plain, exact))
    for i, (a, b, c) in enumerate(zip(*trees, strict=True)):
        # These raise and do not assert, since `python -O` drops assert statements.
        if a.shape != c.shape:
            raise AssertionError(f"leaf {i}: shape {a.shape}, exact {c.shape}")
        if a.shape != b.shape:
            raise AssertionError(f"leaf {i}: shape {a.shape}, plain {b.shape}")
        if a.dtype != b.dtype:
            raise AssertionError(f"leaf {i}: dtype {a.dtype}, plain {b.dtype}")
        bound = 2 * relative_error(b, c) + float(jnp.finfo(a.dtype).eps) / 2
        error = relative_error(a, c)
        # Written as `not <=`, so that a NaN fails.
        if not error <= bound:
            raise AssertionError(f"leaf {i}: error {error:.3g} above {bound:.3g}")
