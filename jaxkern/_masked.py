"""Products with weights that each sample masks in its own way."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import (
    Implementation,
    check_floating,
    check_key,
    check_shape,
    check_xla_only,
    raise_unknown,
)
from ._matmul import matmul, widen

Method = Literal["loop", "einsum", "bmm", "vmap", "fused"]
Arrays = tuple[jax.Array, ...]
Estimator = Callable[..., jax.Array]
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Layer = Callable[[jax.Array, Arrays, Product], jax.Array]
Biases = tuple[Float[Array, "hidden"], Float[Array, "hidden"], Float[Array, "d_out"]]


# In the precision of w, which callers widen: the gradient of w is a sum over samples,
# and is rounded once.
def _masked(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    return (w * mask.astype(w.dtype)).astype(x.dtype)


def _product(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    return matmul(x, _masked(x, w, mask))


def _einsum(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.einsum("bsd,bdm->bsm", x, _masked(x, w, mask))


def _bmm(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    # The barrier keeps XLA from computing the operand inside of the product.
    return jnp.matmul(x, lax.optimization_barrier(_masked(x, w, mask)))


def _run(
    layer: Layer,
    x: Float[Array, "batch seq d_in"],
    logits: Arrays,
    estimator: Estimator,
    method: Method,
    key: PRNGKeyArray | None,
) -> Float[Array, "batch seq d_out"]:
    """`layer(x[b], the masks of sample b, product)` for every b."""
    shared = logits[0].ndim == 2
    samples = 1 if shared else len(x)
    keys = None if key is None else jax.random.split(key, (samples, len(logits)))

    def draw(logits: Arrays, keys: jax.Array | None) -> Arrays:
        if keys is None:
            return tuple(map(estimator, logits))
        pairs = zip(logits, keys, strict=True)
        return tuple(estimator(one, key=key) for one, key in pairs)

    def sample(x: jax.Array, logits: Arrays, keys: jax.Array | None) -> jax.Array:
        return layer(x, draw(logits, keys), _product)

    if shared:
        return sample(x, logits, None if keys is None else keys[0])
    each = x, logits, keys
    match method:
        case "loop":
            parts = [jax.tree.map(lambda a, b=b: a[b], each) for b in range(samples)]
            return jnp.stack([sample(*part) for part in parts])
        case "einsum":
            return layer(x, jax.vmap(draw)(logits, keys), _einsum)
        case "bmm":
            return layer(x, jax.vmap(draw)(logits, keys), _bmm)
        case "vmap":
            return jax.vmap(sample)(*each)
        case "fused":
            # The backward starts again from the arguments: what one sample needs for it
            # is as large as a weight, and cheaper to make than to keep for all.
            one = jax.checkpoint(sample, prevent_cse=False)
            return lax.map(lambda part: one(*part), each)


def _check_options(op: str, method: object, implementation: Any, key: Any) -> None:
    check_xla_only(op, implementation)
    if method not in get_args(Method):
        raise_unknown(op, "method", method, get_args(Method))
    if key is not None:
        check_key(op, key)


def _check_logits(
    op: str, name: str, logits: Any, w: Any, of: str, x: Any, shared: bool
) -> None:
    check_floating(op, **{name: logits})
    batched = (x.shape[0], *w.shape)
    because = f" for the {x.shape[0]} samples of {of}"
    check_shape(op, name, logits, w.shape if shared else batched, because)


def _check_estimator(
    op: str, estimator: Any, logits: Arrays, key: PRNGKeyArray | None
) -> None:
    if not callable(estimator):
        raise TypeError(f"{op}: estimator must be callable, got {estimator!r}")
    options = {} if key is None else {"key": key}
    for one in logits:
        given = jax.ShapeDtypeStruct(one.shape[-2:], one.dtype)
        mask = jax.eval_shape(estimator, given, **options)
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
    mask_logits: Float[Array, "*batch_or_none d_in d_out"],
    *,
    estimator: Estimator,
    method: Method = "fused",
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch seq d_out"]:
    r"""Multiply each sample by the one weight under that sample's own mask.

    $$y_b = x_b (W \odot m_b), \qquad m_b = \mathrm{estimator}(\ell_b)$$

    The methods compute the same, values and gradients:

    - "loop": one product a sample, unrolled;
    - "einsum": one contraction over all masked weights;
    - "bmm": a batched product of masked weights that are written to memory;
    - "vmap": the product of one sample under `jax.vmap`;
    - "fused": one sample after the other in a compiled loop. Its temporary memory does
      not grow with the batch: masks and masked weights exist for one sample at a time,
      in the backward too, which makes them again from the logits.

    With logits (d_in, d_out) all samples share one mask; every method is then the same
    single product. To use the first samples of more logits, pass `mask_logits[:batch]`.

    Masks and products with them are made in float32 and rounded once to the dtype of
    `x`. The logits may have another dtype.

    The samples of a batch that is sharded on an automatic mesh are gathered by "fused",
    which walks along them; inside `jax.shard_map` each device walks along its own.

    Args:
        estimator: from logits (d_in, d_out) to a mask of their shape and dtype, such as
            `straight_through`. It sees one sample, so it need not be elementwise.
        key: for estimators that draw, such as `reinmax`: each sample's call gets a
            `key` of its own, the same by every method. An estimator that holds a key
            itself draws the same noise for every sample.

    Raises:
        TypeError: an array is none or not floating-point, the dtypes of `x` and `w`
            differ, `estimator` is not callable, or `key` is no key.
        ValueError: the shapes do not fit, the estimator returns something other than a
            mask like its logits, or `method` or `implementation` is unknown.
        NotImplementedError: `implementation` is "mosaic_gpu", which has no kernel yet.
    """
    op = "masked_matmul"
    _check_options(op, method, implementation, key)
    check_floating(op, x=x, w=w)
    check_shape(op, "x", x, ("batch", "seq", "d_in"))
    check_shape(op, "w", w, (x.shape[2], "d_out"), f" for x of shape {x.shape}")
    shared = getattr(mask_logits, "ndim", None) == 2
    _check_logits(op, "mask_logits", mask_logits, w, "x", x, shared)
    _check_estimator(op, estimator, (mask_logits,), key)
    x, w, mask_logits = map(jnp.asarray, (x, w, mask_logits))
    wide = widen(w)

    def layer(x: jax.Array, masks: Arrays, product: Product) -> jax.Array:
        return product(x, wide, masks[0])

    return _run(layer, x, (mask_logits,), estimator, method, key)


def _check_three(op: str, **tuples: Any) -> None:
    for name, arrays in tuples.items():
        if not isinstance(arrays, tuple | list) or len(arrays) != 3:
            size = f" of {len(arrays)}" if isinstance(arrays, tuple | list) else ""
            raise TypeError(
                f"{op}: {name} must be a tuple of three arrays, "
                f"got {type(arrays).__name__}{size}"
            )


def _check_bilinear(
    op: str, h: Any, weights: Any, mask_logits: Any, biases: Any | None
) -> None:
    _check_three(op, weights=weights, mask_logits=mask_logits)
    arrays = {f"weights[{i}]": w for i, w in enumerate(weights)}
    if biases is not None:
        _check_three(op, biases=biases)
        arrays |= {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    check_floating(op, h=h, **arrays)
    check_shape(op, "h", h, ("batch", "seq", "d_in"))
    given = f" for h of shape {h.shape}"
    check_shape(op, "weights[0]", weights[0], (h.shape[2], "hidden"), given)
    check_shape(op, "weights[1]", weights[1], weights[0].shape)
    check_shape(op, "weights[2]", weights[2], (weights[0].shape[1], "d_out"))
    shared = getattr(mask_logits[0], "ndim", None) == 2
    for i in range(3):
        if biases is not None:
            check_shape(op, f"biases[{i}]", biases[i], weights[i].shape[1:])
        name = f"mask_logits[{i}]"
        _check_logits(op, name, mask_logits[i], weights[i], "h", h, shared)


def masked_bilinear(
    h: Float[Array, "batch seq d_in"],
    weights: tuple[
        Float[Array, "d_in hidden"],
        Float[Array, "d_in hidden"],
        Float[Array, "hidden d_out"],
    ],
    mask_logits: tuple[
        Float[Array, "*batch_or_none d_in hidden"],
        Float[Array, "*batch_or_none d_in hidden"],
        Float[Array, "*batch_or_none hidden d_out"],
    ],
    *,
    estimator: Estimator,
    biases: Biases | None = None,
    method: Method = "fused",
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch seq d_out"]:
    r"""A bilinear MLP whose three weights each sample masks in its own way.

    $$y_b = ((h_b (W_1 \odot m_{1b}) + b_1) \odot (h_b (W_2 \odot m_{2b}) + b_2))
      (W_3 \odot m_{3b}) + b_3$$

    Masks, `method` and `key` are as in `masked_matmul`; the biases are not masked.
    "fused" keeps only the arguments for the backward, which therefore computes the two
    products with `h` again: 11 products, where the other methods have 9.

    A mask of zeros is safe but can be for ever: where all of $m_3$ is 0, $m_1$ and
    $m_2$ get no gradient, and $m_3$ gets one only if $b_1 \odot b_2$ or $m_1$ and
    $m_2$ are not 0.

    Raises:
        TypeError: as `masked_matmul`, or weights, logits or biases are not three.
        ValueError: as `masked_matmul`.
        NotImplementedError: `implementation` is "mosaic_gpu", which has no kernel yet.

    References:
        Bilinear MLPs, section 2: https://arxiv.org/abs/2410.08417.
    """
    op = "masked_bilinear"
    _check_options(op, method, implementation, key)
    _check_bilinear(op, h, weights, mask_logits, biases)
    logits = tuple(map(jnp.asarray, mask_logits))
    _check_estimator(op, estimator, logits, key)
    h = jnp.asarray(h)
    wide = [widen(jnp.asarray(w)) for w in weights]
    wide_biases = None if biases is None else [widen(jnp.asarray(b)) for b in biases]

    def layer(h: jax.Array, masks: Arrays, product: Product) -> jax.Array:
        def affine(x: jax.Array, i: int) -> jax.Array:
            y = product(x, wide[i], masks[i])
            return y if wide_biases is None else _add(y, wide_biases[i])

        return affine(affine(h, 0) * affine(h, 1), 2)

    return _run(layer, h, logits, estimator, method, key)


def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
    return (widen(y) + bias).astype(y.dtype)
