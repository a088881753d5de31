"""The emulator evaluates programs as JAX does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax import lax

from jaxkern.testing.emulator.evaluate import evaluate

X, INTEGERS = normal(0, (4, 6)), jnp.arange(-4, 5)
BF16 = X.astype(jnp.bfloat16)
# Each program is a function and its arguments.
PROGRAMS = {
    "integers": (lambda x, y: (x // y, x % y, lax.div(x, y), -x, ~x), INTEGERS, 3),
    "bits": (lambda x: (x & 3, x | 8, x ^ 5, x << 2, x >> 1), INTEGERS),
    "wrapped": (lambda x: (x * 2**30, x + (2**31 - 1), abs(x)), INTEGERS),
    "comparisons": (
        lambda x: (x < 1, x <= 1, x > 1, x >= 1, x == 1, x != 1, ~(x > 0)),
        INTEGERS,
    ),
    "of NaN and infinities": (
        lambda x: (jnp.maximum(x, 0), jnp.minimum(x, 0), jnp.sign(x), x < 0, 1 / x),
        jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0, -0.0]),
    ),
    "selections": (
        lambda x: (
            jnp.where(x > 0, x, 0),
            jnp.where(x[0] > 3, x, 1 - x),
            lax.select_n(x % 3, x, 2 * x, 3 * x),
            jnp.clip(x, -1, 2),
        ),
        INTEGERS,
    ),
    "conversions": (
        lambda x: (x.astype(jnp.int8), x.astype(bool), x.astype(jnp.float16), x > 0),
        jnp.array([-1e9, -1.5, -0.5, 0.0, 0.7, 300.0, jnp.nan]),
    ),
    "shapes": (
        lambda x: (
            x.reshape(3, 8),
            x.T,
            x[None, :, 0],
            x[1:3, ::2],
            jnp.broadcast_to(x[0], (2, 6)),
            jnp.concatenate([x, x], 1),
            lax.broadcasted_iota(jnp.int32, (2, 3), 1),
            jnp.pad(x, 1),
        ),
        X,
    ),
    "slices that would reach past the end": (
        lambda x, i: (
            lax.dynamic_slice(x, (i, 1), (3, 2)),
            lax.dynamic_slice(x, (-7 * i, i), (2, 2)),
            lax.dynamic_update_slice(x, x[:2, :2], (i, i)),
        ),
        X,
        3,
    ),
    "sums": (lambda x: (x.sum(0), x.max(), jnp.argsort(x, 1), jnp.cumsum(x, 0)), X),
    "sums in 16 bits": (lambda x: (x.sum(), x.max(1), x * x + x), BF16),
    "functions": (
        lambda x: (
            jnp.exp(x),
            jnp.exp2(x),
            jnp.log(x),
            jnp.log2(x),
            jnp.tanh(x),
            jnp.sqrt(x),
            x**3,
            jax.nn.sigmoid(x),
        ),
        X,
    ),
    "products": (lambda x: jnp.dot(x, x.T, preferred_element_type=jnp.float32), BF16),
    "while": (lambda n: lax.while_loop(lambda c: c < n, lambda c: c * n, 2), 9),
    "branches": (
        lambda i: [
            lax.switch(i + j, [lambda: 1, lambda: 2, lambda: 3]) for j in (0, 9)
        ],
        -1,
    ),
    "scan": (lambda x: lax.scan(lambda c, y: (c + y, c * y), x[0], x), X),
    "scan from the end": (
        lambda x: lax.scan(lambda c, y: (c + y, (c, 2 * y)), x[0], x, reverse=True),
        X,
    ),
    "scan of nothing": (lambda x: lax.scan(lambda c, y: (c, y), 1, x[:0]), X),
    "loop with a constant": (
        lambda x, n: lax.fori_loop(0, 3, lambda i, c: c * n + i, x),
        X,
        2,
    ),
    "an argument and a literal": (lambda x: (x, 1.5, x), X),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_computes_what_jax_does(name):
    fn, *args = PROGRAMS[name]
    jaxpr = jax.make_jaxpr(fn)(*args)
    got = evaluate(
        jaxpr, jaxpr.consts, [np.asarray(x, jnp.result_type(x)) for x in args]
    )
    expected = jax.tree.leaves(fn(*args))
    assert len(got) == len(expected)
    for mine, theirs in zip(got, map(jnp.asarray, expected), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, name
        np.testing.assert_allclose(
            np.asarray(mine, float), np.asarray(theirs, float), 2e-6, 1e-7
        )
