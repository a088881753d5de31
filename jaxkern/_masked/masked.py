"""Products with weights that each sample masks in its own way."""

from collections.abc import Callable
from typing import Any, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import (
    check_floating,
    check_key,
    check_shape,
    given,
    kind_of,
    raise_unknown,
)
from .._core.dispatch import Implementation, check_implementation
from .._core.precision import widen
from .estimators import Estimator, estimator_of, needs_key, rule_of
from .forms import (
    KEPT_NAME,
    Arrays,
    Logits,
    Masks,
    Method,
    Parameters,
    Product,
    Sum,
    run_layer,
)
from .packed import WORD, PackedMask, check_packed_mask, unpack_mask

Biases = tuple[Float[Array, "hidden"], Float[Array, "hidden"], Float[Array, "d_out"]]


def _check_options(op: str, method: object, implementation: Any, key: Any) -> None:
    check_implementation(op, implementation)
    methods = (None, *get_args(Method))
    if method not in methods:
        raise_unknown(op, "method", method, methods)
    if key is not None:
        check_key(op, key)


def _check_logits(
    op: str, name: str, logits: Any, w: Any, of: str, x: Any, shared: bool
) -> jax.Array | PackedMask:
    """Return the logits or the packed mask of one weight, checked."""
    rows, columns = w.shape
    because = f" for the {x.shape[0]} samples of {of}"
    if isinstance(logits, PackedMask):
        logits = check_packed_mask(op, name, logits)
        if logits.d_in != rows:
            raise ValueError(f"{op}: {name} must have d_in={rows}, got {logits.d_in}")
        name, array, rows = f"words of {name}", logits.words, -(-rows // WORD)
    else:
        (logits,) = (array,) = check_floating(op, **{name: logits})
    batch = () if shared else (x.shape[0],)
    check_shape(op, name, array, (*batch, rows, columns), because)
    return logits


def _check_masks(
    op: str, logits: Any, estimator: Any, key: PRNGKeyArray | None
) -> Masks:
    packed = [isinstance(one, PackedMask) for one in logits]
    if any(packed):
        for name, option in [("estimator", estimator), ("key", key)]:
            if option is not None:
                raise ValueError(f"{op}: {name} must be None for packed masks, got one")
        if not all(packed):
            raise TypeError(f"{op}: mask_logits must be all packed, or none of them")
        return Masks(logits, unpack_mask, None, None)
    make = estimator_of(op, estimator)
    if isinstance(estimator, str) and key is None and needs_key(make):
        raise TypeError(f"{op}: key must be given for {estimator}, which draws")
    _check_result(op, make, logits, key)
    return Masks(logits, make, rule_of(make) if key is None else None, key)


def _check_result(
    op: str, make: Callable[..., Any], logits: Any, key: PRNGKeyArray | None
) -> None:
    """Check that the estimator makes masks in the shape and dtype of the logits."""
    options = {} if key is None else {"key": key}
    for one in logits:
        given = jax.ShapeDtypeStruct(one.shape[-2:], one.dtype)
        mask = jax.eval_shape(make, given, **options)
        shape, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", None)
        if (shape, dtype) != (given.shape, given.dtype):
            got = type(mask).__name__ if shape is None else f"{dtype}{shape}"
            raise ValueError(
                f"{op}: estimator must return an array like the logits of a sample, "
                f"{given.dtype}{given.shape}, got {got}"
            )


def masked_matmul(
    x: Float[Array, "batch seq d_in"],
    w: Float[Array, "d_in d_out"],
    mask_logits: Float[Array, "*batch_or_none d_in d_out"] | PackedMask,
    *,
    estimator: Estimator | None = None,
    method: Method | None = None,
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch seq d_out"]:
    r"""Multiply each sample by the one weight under that sample's own mask.

    $$y_b = x_b (W \odot m_b), \qquad m_b = \mathrm{estimator}(\ell_b)$$

    With logits (d_in, d_out) all samples share one mask, and every method is the same
    single product. Masks that no longer learn can be packed: a `PackedMask` in the
    place of the logits takes no estimator and has no gradient. Masks and masked weights
    are computed in float32 and rounded once to the dtype of `x`; the logits may have
    another dtype.

    `method` names a form of XLA. All compute the same values and gradients:

    - "loop": one product per sample, unrolled.
    - "einsum": one contraction over all masked weights.
    - "bmm": a batched product of masked weights that are written to memory.
    - "vmap": the product of one sample under `jax.vmap`.
    - "fused": one sample after the other in a compiled loop, so that masked weights
      exist for one sample at a time, also in the backward pass, and take no more memory
      for a larger batch. Samples that are sharded on an automatic mesh are gathered;
      inside `jax.shard_map` each device loops over its own.
    - `None` takes "bmm" on a GPU, unless the masked weights of the batch would take
      more than an eighth of its memory, and "fused" otherwise.

    Implementations:

    - "xla": one of the forms above, on any device, with all of JAX's derivatives.
    - "mosaic_gpu": the form "fused" for all samples at once, on an H100 or H200, in
      bfloat16 and float16. It masks weights in registers on their way to the tensor
      cores. It reads packed masks as bits. It reads logits directly if the estimator is
      `reinmax` or `straight_through` without a key, given by itself, by its name, or in
      a `functools.partial` that binds only defaults and
      `derivative="one_plus_sigmoid"`. For any other estimator XLA makes and keeps the
      masks of all samples. In masks that the kernel makes itself, the backward pass
      treats a NaN as off. Gradients are deterministic and in reverse mode only:
      `jax.jvp` needs "xla". Sizes that are not multiples of 8 tokens and 64 features
      are padded by copies.
    - `None` uses the kernel if it supports the inputs, for two or more samples with
      masks of their own and 8 to 2048 tokens each, on one device or inside
      `jax.shard_map`; XLA cannot split a kernel over devices. On an H200 the kernel was
      measured to be faster with 16 samples and slower with one; the other thresholds
      are predicted.

    Args:
        x: The samples.
        w: The weight that all samples share.
        mask_logits: The logits of each sample's mask, or of one for all samples, or a
            `PackedMask`. To use the first masks only, pass `mask_logits[:batch]`.
        estimator: A function from logits (d_in, d_out) to a mask of their shape and
            dtype, such as `straight_through`, or the name of an estimator of this
            library. It sees one sample at a time, so it need not be elementwise.
        method: The form of XLA, see above. The kernels allow None and "fused".
        key: A random key for estimators that draw, such as `reinmax`. Each sample's
            call gets a `key` of its own, the same by every method. An estimator that
            holds a key itself draws the same noise for every sample.
        implementation: See above.

    Returns:
        The products, in the dtype of `x`.

    Raises:
        TypeError: An array is not a floating-point array, the dtypes of `x` and `w`
            differ, `estimator` is neither callable nor a name, or `key` is not a random
            key.
        ValueError: The shapes do not fit, the estimator returns something other than a
            mask like its logits, packed masks come with an estimator or a key, or the
            name of an estimator, `method` or `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; the message
            says why.

    Examples:
        Two samples use different rows of one weight:

        ```python
        import jax.numpy as jnp
        import jaxkern

        x, w = jnp.ones((2, 1, 2)), jnp.array([[1.0, 2.0], [10.0, 20.0]])
        logits = jnp.array([[[1.0, 1.0], [-1.0, -1.0]], [[-1.0, -1.0], [1.0, 1.0]]])
        y = jaxkern.masked_matmul(x, w, logits, estimator="straight_through")
        print(y[:, 0])
        ```
        ```text
        [[ 1.  2.]
         [10. 20.]]
        ```

    References:
        Learned weight masks: Supermasks in Superposition,
            https://arxiv.org/abs/2006.14769.
    """
    op = "masked_matmul"
    _check_options(op, method, implementation, key)
    x, w = check_floating(op, x=x, w=w)
    check_shape(op, "x", x, ("batch", "seq", "d_in"))
    check_shape(op, "w", w, (x.shape[2], "d_out"), given(x))
    shared = getattr(mask_logits, "ndim", None) == 2
    logits = _check_logits(op, "mask_logits", mask_logits, w, "x", x, shared)
    masks = _check_masks(op, (logits,), estimator, key)
    return run_layer(op, _linear, x, ((w,), None), masks, method, implementation)


def _linear(
    x: jax.Array, parameters: Parameters, masks: Arrays, product: Product, add: Sum
) -> jax.Array:
    return product(x, widen(parameters[0][0]), masks[0])


def _check_three(op: str, **tuples: Any) -> None:
    """Check that each is a tuple of three."""
    for name, arrays in tuples.items():
        if not isinstance(arrays, tuple | list) or len(arrays) != 3:
            size = f" of {len(arrays)}" if isinstance(arrays, tuple | list) else ""
            raise TypeError(
                f"{op}: {name} must be a tuple of three arrays, "
                f"got {kind_of(arrays)}{size}"
            )


def _check_bilinear(
    op: str, x: Any, weights: Any, mask_logits: Any, biases: Any | None
) -> tuple[jax.Array, Parameters, Logits]:
    _check_three(op, weights=weights, mask_logits=mask_logits)
    arrays = {f"weights[{i}]": w for i, w in enumerate(weights)}
    if biases is not None:
        _check_three(op, biases=biases)
        arrays |= {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    x, *rest = check_floating(op, x=x, **arrays)
    weights, biases = tuple(rest[:3]), tuple(rest[3:]) or None
    check_shape(op, "x", x, ("batch", "seq", "d_in"))
    check_shape(op, "weights[0]", weights[0], (x.shape[2], "hidden"), given(x))
    check_shape(op, "weights[1]", weights[1], weights[0].shape)
    check_shape(op, "weights[2]", weights[2], (weights[0].shape[1], "d_out"))
    shared, logits = getattr(mask_logits[0], "ndim", None) == 2, []
    for i, (one, w) in enumerate(zip(mask_logits, weights, strict=True)):
        if biases is not None:
            check_shape(op, f"biases[{i}]", biases[i], w.shape[1:])
        name = f"mask_logits[{i}]"
        logits.append(_check_logits(op, name, one, w, "x", x, shared))
    return x, (weights, biases), tuple(logits)


def masked_bilinear(
    x: Float[Array, "batch seq d_in"],
    weights: tuple[
        Float[Array, "d_in hidden"],
        Float[Array, "d_in hidden"],
        Float[Array, "hidden d_out"],
    ],
    mask_logits: tuple[
        Float[Array, "*batch_or_none d_in hidden"] | PackedMask,
        Float[Array, "*batch_or_none d_in hidden"] | PackedMask,
        Float[Array, "*batch_or_none hidden d_out"] | PackedMask,
    ],
    *,
    estimator: Estimator | None = None,
    biases: Biases | None = None,
    method: Method | None = None,
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch seq d_out"]:
    r"""A bilinear MLP whose three weights each sample masks in its own way.

    $$y_b = ((x_b (W_1 \odot m_{1b}) + b_1) \odot (x_b (W_2 \odot m_{2b}) + b_2))
      (W_3 \odot m_{3b}) + b_3$$

    Masks, `method`, `key` and `implementation` are as in `masked_matmul`. For the
    backward pass "fused" keeps the products with `x`, (batch, seq, hidden), but no
    masked weights. Under `jax.checkpoint` it computes them again.

    Masks of zeros can stay zero for ever: where all of $m_3$ is 0, $m_1$ and $m_2$ get
    no gradient, and $m_3$ gets one only if $b_1 \odot b_2$, or $m_1$ and $m_2$, are not
    0.

    Args:
        x: The samples.
        weights: $W_1$, $W_2$ and $W_3$.
        mask_logits: The logits of the masks of the three weights, all with an axis of
            samples or all without, or three `PackedMask`.
        estimator: As in `masked_matmul`.
        biases: $b_1$, $b_2$ and $b_3$, which are not masked; None for no biases.
        method: As in `masked_matmul`.
        key: As in `masked_matmul`.
        implementation: As in `masked_matmul`.

    Returns:
        The outputs of the MLP, in the dtype of `x`.

    Raises:
        TypeError: As in `masked_matmul`; or weights, logits or biases are not three, or
            only some of the masks are packed.
        ValueError: As in `masked_matmul`.
        NotImplementedError: As in `masked_matmul`.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        x = jnp.ones((2, 5, 4))
        weights = jnp.ones((4, 8)), jnp.ones((4, 8)), jnp.ones((8, 3))
        logits = tuple(jnp.ones((2, *w.shape)) for w in weights)
        y = jaxkern.masked_bilinear(x, weights, logits, estimator="straight_through")
        print(y.shape, y[0, 0])
        ```
        ```text
        (2, 5, 3) [128. 128. 128.]
        ```

    References:
        Bilinear MLPs, section 2: https://arxiv.org/abs/2410.08417.
    """
    op = "masked_bilinear"
    _check_options(op, method, implementation, key)
    x, parameters, logits = _check_bilinear(op, x, weights, mask_logits, biases)
    masks = _check_masks(op, logits, estimator, key)
    return run_layer(op, _bilinear, x, parameters, masks, method, implementation)


def _bilinear(
    x: jax.Array, parameters: Parameters, masks: Arrays, product: Product, add: Sum
) -> jax.Array:
    weights, biases = parameters

    def affine(features: jax.Array, i: int) -> jax.Array:
        y = product(features, widen(weights[i]), masks[i])
        return y if biases is None else add(y, widen(biases[i]))

    left, right = (checkpoint_name(affine(x, i), KEPT_NAME) for i in range(2))
    return affine(left * right, 2)
