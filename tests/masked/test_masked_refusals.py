import jax.numpy as jnp
import pytest
from helpers import untyped
from masked_definitions import bilinear_args, matmul_args

from jaxkern import reinmax

(X, W, L), _ = matmul_args((2, 3, 4, 5, 0))
(H, WS, LS, BS), _ = bilinear_args((2, 3, 4, 5, 6))


@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"x": X[0]},
            ValueError,
            r"x must have shape \(batch, seq, d_in\), got \(3, 4",
        ),
        (
            {"w": W.T},
            ValueError,
            r"w must have shape \(4, d_out\) for x of .*, got \(5",
        ),
        (
            {"mask_logits": jnp.concatenate([L, L])},
            ValueError,
            r"mask_logits must have shape \(2, 4, 5\) for the 2 samples of x, got \(4",
        ),
        ({"mask_logits": L[0].T}, ValueError, r"logits must have shape \(4, 5\) for"),
        ({"mask_logits": L[0, 0]}, ValueError, r"must have shape \(2, 4, 5\) for"),
        ({"mask_logits": L > 0}, TypeError, "mask_logits must have a floating-point"),
        ({"w": W.astype(jnp.bfloat16)}, TypeError, "w must have the dtype of x"),
        (
            {"method": "scan"},
            ValueError,
            "method must be one of None, 'loop', .*, got 'scan'",
        ),
        (
            {"estimator": 3},
            TypeError,
            "estimator must be callable or one of 'straight_through', .*, got 3",
        ),
        (
            {"estimator": "reinmaxx"},
            ValueError,
            "estimator must be one of 'straight_through', .*, got 'reinmaxx'",
        ),
        (
            {"estimator": lambda a: a[0]},
            ValueError,
            r"a sample, float32\(4, 5\), got float32\(5,\)",
        ),
        ({"estimator": lambda a: a > 0}, ValueError, r"got bool\(4, 5\)"),
        ({"estimator": lambda a: (a, a)}, ValueError, "got tuple"),
        ({"key": 3}, TypeError, "key must be a key, as .*, got 3"),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation must be one of None, 'xla', 'mosaic_gpu', got 'cuda'",
        ),
        (
            {"implementation": "mosaic_gpu"},
            NotImplementedError,
            "dtype must be bfloat16 or float16 for mosaic_gpu, got float32",
        ),
        (
            {"estimator": "binary_concrete"},
            TypeError,
            "key must be given for binary_concrete, which draws",
        ),
    ],
)
def test_refusals_of_masked_matmul(changes, error, message):
    options = {"x": X, "w": W, "mask_logits": L, "estimator": reinmax} | changes
    with pytest.raises(error, match=f"masked_matmul: .*{message}"):
        untyped.masked_matmul(**options)


@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"weights": WS[:2]}, TypeError, "weights must be a tuple of three .* of 2"),
        ({"mask_logits": LS[0]}, TypeError, "mask_logits must be a tuple of three"),
        ({"biases": BS[0]}, TypeError, "biases must be a tuple of three"),
        (
            {"weights": (WS[0], WS[1][:, 1:], WS[2])},
            ValueError,
            r"weights\[1\] must have shape \(4, 5\), got \(4, 4\)",
        ),
        (
            {"mask_logits": (LS[0], LS[1][0], LS[2])},
            ValueError,
            r"mask_logits\[1\] must have shape \(2, 4, 5\) for the 2 .* x, got \(4",
        ),
        (
            {"biases": (BS[0], BS[1], BS[0])},
            ValueError,
            r"biases\[2\] must have shape \(6,\), got \(5,\)",
        ),
        (
            {"implementation": "mosaic_gpu"},
            NotImplementedError,
            "dtype must be bfloat16 or float16 for mosaic_gpu",
        ),
    ],
)
def test_refusals_of_masked_bilinear(changes, error, message):
    options = {"x": H, "weights": WS, "mask_logits": LS, "biases": BS}
    with pytest.raises(error, match=f"masked_bilinear: {message}"):
        untyped.masked_bilinear(**options | {"estimator": reinmax} | changes)
