import jax.numpy as jnp
import pytest
from helpers import untyped
from mlp_definitions import DOWN, UP, V, W, X


@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: untyped.swiglu(X, V, W, V),
            ValueError,
            r"swiglu: w_gate must have shape \(8, hidden\) for x of shape \(2, 8\)",
        ),
        (
            lambda: untyped.swiglu(X, W, W[:, :5], V),
            ValueError,
            r"swiglu: w_up must have shape \(8, 12\), got \(8, 5\)",
        ),
        (
            lambda: untyped.swiglu(X, W, W, W),
            ValueError,
            r"swiglu: w_down must have shape \(12, d_out\), got \(8, 12\)",
        ),
        (
            lambda: untyped.swiglu(X, W[0], W, V),
            ValueError,
            r"w_gate must have shape \(8, hidden\) .*, got \(12,\)",
        ),
        (
            lambda: untyped.swiglu(X.astype(int), W, W, V),
            TypeError,
            "swiglu: x must have a floating-point dtype out of float32, .*, got int32",
        ),
        (
            lambda: untyped.swiglu(X, W, W, V.astype(jnp.bfloat16)),
            TypeError,
            "swiglu: w_down must have the dtype of x, float32, got bfloat16",
        ),
        (
            lambda: untyped.swiglu(None, W, W, V),
            TypeError,
            "x must be an array, got None",
        ),
        (
            lambda: untyped.swiglu(X, W, W, V, implementation="mosaic_gpu"),
            NotImplementedError,
            "swiglu: dtype must be bfloat16 or float16 for mosaic_gpu, got float32",
        ),
        (
            lambda: untyped.swiglu(X, W, W, V, implementation="cuda"),
            ValueError,
            "implementation must be one of None, 'xla', 'mosaic_gpu', got 'cuda'",
        ),
        (
            lambda: untyped.low_rank_matmul(X, (jnp.ones((8, 0)), jnp.ones((0, 4)))),
            ValueError,
            r"low_rank_matmul: weight\[0\] must have shape \(8, rank\) for x of shape "
            r"\(2, 8\) and no empty axis, got \(8, 0\)",
        ),
        (
            lambda: untyped.low_rank_matmul(X, (UP[0], jnp.ones((4, 12)))),
            ValueError,
            r"weight\[1\] must have shape \(3, d_out\), got \(4, 12\)",
        ),
        (
            lambda: untyped.low_rank_matmul(X, W),
            TypeError,
            r"low_rank_matmul: weight must be a pair \(w_in, w_out\), got",
        ),
        (
            lambda: untyped.low_rank_matmul(X, (W,)),
            TypeError,
            r"weight must be a pair \(w_in, w_out\), got tuple of 1",
        ),
        (
            lambda: untyped.low_rank_swiglu(X, UP, (UP[0], UP[1][:, :4]), DOWN),
            ValueError,
            r"low_rank_swiglu: up\[1\] must have shape \(3, 12\), got \(3, 4\)",
        ),
        (
            lambda: untyped.low_rank_relu2(X, UP, UP),
            ValueError,
            r"low_rank_relu2: down\[0\] must have shape \(12, rank\), got \(8, 3\)",
        ),
        (
            lambda: untyped.low_rank_relu2(X, UP, DOWN, sparsity="4:8"),
            ValueError,
            "sparsity must be one of None, '2:4', '2:4-soft', '2:4-static', got '4:8'",
        ),
        (
            lambda: untyped.low_rank_relu2(X, UP, DOWN, sparsity="2:4", gradient="st"),
            ValueError,
            "low_rank_relu2: gradient must be one of None, 'exact', "
            "'straight_through', 'feature_wise', got 'st'",
        ),
        (
            lambda: untyped.low_rank_relu2(X, UP, DOWN, gradient="straight_through"),
            ValueError,
            "gradient must be None for sparsity=None, which drops nothing, got 'strai",
        ),
        (
            lambda: untyped.low_rank_relu2(
                X, UP, DOWN, sparsity="2:4-soft", gradient="feature_wise"
            ),
            ValueError,
            "gradient must be None or 'exact' or 'straight_through' for "
            "sparsity='2:4-soft', got 'feature_wise'",
        ),
        (
            lambda: untyped.low_rank_relu2(
                X, UP, DOWN, sparsity="2:4-static", gradient="straight_through"
            ),
            ValueError,
            "gradient must be None or 'exact' for sparsity='2:4-static', which never "
            "computes what it drops, got 'straight_through'",
        ),
        (
            lambda: untyped.low_rank_relu2(
                X,
                UP,
                DOWN,
                sparsity="2:4",
                gradient="feature_wise",
                implementation="mosaic_gpu",
            ),
            NotImplementedError,
            "gradient must be None, 'exact' or 'straight_through' for mosaic_gpu, got",
        ),
        (
            lambda: untyped.low_rank_relu2(X, UP, DOWN, implementation="mosaic_gpu"),
            NotImplementedError,
            "low_rank_relu2: dtype must be bfloat16 or float16 for mosaic_gpu",
        ),
        (
            lambda: untyped.low_rank_relu2(
                X,
                UP,
                DOWN,
                sparsity="2:4-soft",
                gradient="exact",
                implementation="mosaic_gpu",
            ),
            NotImplementedError,
            "gradient must be None or 'straight_through' for mosaic_gpu and sparsity=",
        ),
        (
            lambda: untyped.low_rank_matmul(X, UP, implementation="mosaic_gpu"),
            NotImplementedError,
            "low_rank_matmul: implementation must be None or 'xla', got 'mosaic_gpu', "
            "for which this op has no kernel",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
