"""Products with weights that each sample masks in its own way."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import check_floating, check_key, check_shape, raise_unknown
from .._core.dispatch import Implementation, check_implementation, choose
from .._core.precision import add, matmul, widen
from .estimators import reinmax, seed_reinmax, straight_through
from .hopper import multiply as _masked_mgpu
from .hopper.product import Kind, bytes_of
from .packed import WORD, PackedMask, check_packed, unpack_mask

Method = Literal["loop", "einsum", "bmm", "vmap", "fused"]
Arrays = tuple[jax.Array, ...]
Logits = tuple[jax.Array | PackedMask, ...]
Estimator = Callable[..., jax.Array]
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Layer = Callable[[jax.Array, Arrays, Product], jax.Array]
Biases = tuple[Float[Array, "hidden"], Float[Array, "hidden"], Float[Array, "d_out"]]


# What "fused" keeps for the backward, but for the arguments.
KEPT = "jaxkern.masked"


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
    logits: Logits,
    estimator: Estimator | None,
    method: Method,
    key: PRNGKeyArray | None,
    implementation: Implementation,
) -> Float[Array, "batch seq d_out"]:
    """`layer(x[b], the masks of sample b, product)` for every b."""
    # What has no estimator is packed.
    make: Callable[..., jax.Array] = estimator or unpack_mask
    shared = logits[0].ndim == 2
    samples = 1 if shared else len(x)
    keys = None if key is None else jax.random.split(key, (samples, len(logits)))

    def draw(logits: Logits, keys: jax.Array | None) -> Arrays:
        if keys is None:
            return tuple(map(make, logits))
        pairs = zip(logits, keys, strict=True)
        return tuple(make(one, key=key) for one, key in pairs)

    def sample(x: jax.Array, logits: Logits, keys: jax.Array | None) -> jax.Array:
        return layer(x, draw(logits, keys), _product)

    if shared and keys is not None:
        keys = keys[0]
    if implementation == "mosaic_gpu":
        kind = _kind(logits, estimator, key)
        if kind == "mask":
            masks = (draw if shared else jax.vmap(draw))(logits, keys)
        else:
            masks = tuple(jax.tree.leaves(logits))
        return layer(x, masks, partial(_masked_mgpu.multiply, kind))
    if shared:
        return sample(x, logits, keys)
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
            # The backward makes masked weights again: what one sample needs of them is
            # as large as a weight, and cheaper to make than to keep for all.
            policy = jax.checkpoint_policies.save_only_these_names(KEPT)
            one = jax.checkpoint(sample, prevent_cse=False, policy=policy)
            return lax.map(lambda part: one(*part), each)


# The kernel makes their masks of logits, and knows their slopes.
KNOWN: dict[Any, Kind] = {
    straight_through: "straight_through",
    seed_reinmax: "seed_reinmax",
    reinmax: "reinmax",
}


def _kind(logits: Logits, estimator: Estimator | None, key: Any) -> Kind:
    """What the kernel makes the masks of."""
    if isinstance(logits[0], PackedMask):
        return "bits"
    for known, kind in KNOWN.items():
        # By identity: what is called need not have a hash.
        if estimator is known and key is None:
            return kind
    return "mask"


def select(
    op: str,
    x: jax.Array,
    weights: Sequence[jax.Array],
    logits: Logits,
    kind: Kind,
    method: Method,
    implementation: Implementation | None,
) -> Implementation:
    """What multiplies: a pure function of shapes, dtypes, method and of the devices.

    Raises:
        NotImplementedError: the kernel was asked for and cannot; it says why.
    """
    kernel = _masked_mgpu
    mask_bytes = max(bytes_of(kind, getattr(one, "dtype", None)) for one in logits)

    def unsupported() -> str | None:
        if method != "fused":
            return f"method must be 'fused' for mosaic_gpu, got {method!r}"
        return kernel.unsupported(x.dtype, mask_bytes)

    def faster() -> bool:
        samples = 1 if logits[0].ndim == 2 else len(x)
        tokens = len(x) * x.shape[1] // samples
        shapes = [(samples, tokens, w.shape[0], w.shape[1]) for w in weights]
        return kernel.predicted_faster(shapes, mask_bytes)

    arrays = x, *weights, *jax.tree.leaves(logits)
    wins = implementation is None and unsupported() is None and faster()
    return choose(op, implementation, arrays, unsupported, wins)


def _check_options(op: str, method: object, implementation: Any, key: Any) -> None:
    check_implementation(op, implementation)
    if method not in get_args(Method):
        raise_unknown(op, "method", method, get_args(Method))
    if key is not None:
        check_key(op, key)


def _check_logits(
    op: str, name: str, logits: Any, w: Any, of: str, x: Any, shared: bool
) -> None:
    rows, columns = w.shape
    because = f" for the {x.shape[0]} samples of {of}"
    if isinstance(logits, PackedMask):
        check_packed(op, name, logits)
        if logits.d_in != rows:
            raise ValueError(f"{op}: {name} must have d_in={rows}, got {logits.d_in}")
        name, logits, rows = f"words of {name}", logits.words, -(-rows // WORD)
    else:
        check_floating(op, **{name: logits})
    batch = () if shared else (x.shape[0],)
    check_shape(op, name, logits, (*batch, rows, columns), because)


def _check_estimator(
    op: str, estimator: Any, logits: Any, key: PRNGKeyArray | None
) -> None:
    packed = [isinstance(one, PackedMask) for one in logits]
    if any(packed):
        for name, option in [("estimator", estimator), ("key", key)]:
            if option is not None:
                raise ValueError(f"{op}: {name} must be None for packed masks")
        if not all(packed):
            raise TypeError(f"{op}: mask_logits must be all packed, or none of them")
        return
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
    mask_logits: Float[Array, "*batch_or_none d_in d_out"] | PackedMask,
    *,
    estimator: Estimator | None = None,
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
    - "fused": masks are applied within the product, and masked weights are not stored
      for the batch, in the backward neither.

    With logits (d_in, d_out) all samples share one mask; every method is then the same
    single product. To use the first samples of more logits, pass `mask_logits[:batch]`.
    Masks that no longer learn can be packed: with a `PackedMask` for logits there is no
    estimator, and no gradient for it.

    Masks and products with them are made in float32 and rounded once to the dtype of
    `x`. The logits may have another dtype.

    Implementations:

    - "xla": "fused" takes one sample after the other in a compiled loop. Masks and
      masked weights exist for one sample at a time, in the backward too, which makes
      them again from the logits, so they take no more memory for a larger batch. The
      samples of a batch that is sharded on an automatic mesh are gathered by it; inside
      `jax.shard_map` each device walks along its own.
    - "mosaic_gpu": "fused" on an H100 or H200, in bfloat16 and float16. Weights are
      multiplied by their mask in registers, on the way to the tensor cores, for all
      samples at once. The kernel reads packed masks as bits, and logits themselves if
      the estimator is `straight_through`, `reinmax` or `seed_reinmax`, without options
      or key. A backward of `x` or `w` reads the bits of such a mask, which its forward
      writes, and in which NaN is off; beside these the reinmaxes keep logits that are
      trained. Of any other estimator the mask is computed by XLA, for all samples, and
      kept, as is its gradient to which the estimator's is applied. Sizes
      that are no multiples of 8 tokens and 64 features are padded by copies. Gradients
      are deterministic, and of reverse mode only: `jax.jvp` needs "xla". Gradients that
      are not asked for are not computed. Under `vmap` the new axis joins the samples;
      an argument that lacks it is copied.

    None picks the kernel for "fused" where it can run and is predicted to be faster, on
    one device or inside `jax.shard_map`, and "xla" elsewhere: XLA cannot split a kernel
    over devices. Predicted, from what steps of the kernels have taken on an H200.

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
            mask like its logits, packed masks come with an estimator or a key, or
            `method` or `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.
    """
    op = "masked_matmul"
    _check_options(op, method, implementation, key)
    check_floating(op, x=x, w=w)
    check_shape(op, "x", x, ("batch", "seq", "d_in"))
    check_shape(op, "w", w, (x.shape[2], "d_out"), f" for x of shape {x.shape}")
    shared = getattr(mask_logits, "ndim", None) == 2
    _check_logits(op, "mask_logits", mask_logits, w, "x", x, shared)
    _check_estimator(op, estimator, (mask_logits,), key)
    x, w, mask_logits = jax.tree.map(jnp.asarray, (x, w, mask_logits))
    logits = (mask_logits,)
    kind = _kind(logits, estimator, key)
    runs = select(op, x, (w,), logits, kind, method, implementation)
    wide = widen(w)

    def layer(x: jax.Array, masks: Arrays, product: Product) -> jax.Array:
        return product(x, wide, masks[0])

    return _run(layer, x, logits, estimator, method, key, runs)


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
        Float[Array, "*batch_or_none d_in hidden"] | PackedMask,
        Float[Array, "*batch_or_none d_in hidden"] | PackedMask,
        Float[Array, "*batch_or_none hidden d_out"] | PackedMask,
    ],
    *,
    estimator: Estimator | None = None,
    biases: Biases | None = None,
    method: Method = "fused",
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch seq d_out"]:
    r"""A bilinear MLP whose three weights each sample masks in its own way.

    $$y_b = ((h_b (W_1 \odot m_{1b}) + b_1) \odot (h_b (W_2 \odot m_{2b}) + b_2))
      (W_3 \odot m_{3b}) + b_3$$

    Masks, `method`, `key` and `implementation` are as in `masked_matmul`; the biases
    are not masked. For the backward "fused" keeps the two products with `h`, both
    (batch, seq, hidden), and by the kernels what these are multiplied to as well:
    memory of activations, not of weights. Under `jax.checkpoint` it computes the two
    again, 11 products instead of 9; the kernels all three, for their masks' bits.

    A mask of zeros is safe but can be for ever: where all of $m_3$ is 0, $m_1$ and
    $m_2$ get no gradient, and $m_3$ gets one only if $b_1 \odot b_2$ or $m_1$ and
    $m_2$ are not 0.

    Raises:
        TypeError: as `masked_matmul`, weights, logits or biases are not three, or only
            some of the masks are packed.
        ValueError: as `masked_matmul`.
        NotImplementedError: as `masked_matmul`.

    References:
        Bilinear MLPs, section 2: https://arxiv.org/abs/2410.08417.
    """
    op = "masked_bilinear"
    _check_options(op, method, implementation, key)
    _check_bilinear(op, h, weights, mask_logits, biases)
    logits = tuple(jax.tree.map(jnp.asarray, one) for one in mask_logits)
    _check_estimator(op, estimator, logits, key)
    h = jnp.asarray(h)
    kind = _kind(logits, estimator, key)
    runs = select(op, h, weights, logits, kind, method, implementation)
    wide = [widen(jnp.asarray(w)) for w in weights]
    wide_biases = None if biases is None else [widen(jnp.asarray(b)) for b in biases]

    add_bias = _masked_mgpu.add_bias if runs == "mosaic_gpu" else add

    def layer(h: jax.Array, masks: Arrays, product: Product) -> jax.Array:
        def affine(x: jax.Array, i: int) -> jax.Array:
            y = product(x, wide[i], masks[i])
            return y if wide_biases is None else add_bias(y, wide_biases[i])

        left, right = (checkpoint_name(affine(h, i), KEPT) for i in range(2))
        return affine(left * right, 2)

    return _run(layer, h, logits, estimator, method, key, runs)
