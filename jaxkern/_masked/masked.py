"""Products with weights that each sample masks in its own way."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from .._core import device
from .._core.checks import (
    check_floating,
    check_key,
    check_shape,
    kind_of,
    raise_unknown,
)
from .._core.dispatch import Implementation, check_implementation, choose, run
from .._core.precision import add, matmul, widen
from .._core.sharding import on_automatic_axes, product_spec
from .estimators import Estimator, Rule, estimator_of, is_fixed, rule_of
from .packed import WORD, PackedMask, check_packed_mask, unpack_mask

Method = Literal["loop", "einsum", "bmm", "vmap", "fused"]
Arrays = tuple[jax.Array, ...]
Logits = tuple[jax.Array | PackedMask, ...]
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Sum = Callable[[jax.Array, jax.Array], jax.Array]
# The weights, and a bias for each or None.
Parameters = tuple[Arrays, Arrays | None]
# From an input, parameters and masks, and how to multiply and add, to the output.
Layer = Callable[[jax.Array, Parameters, Arrays, Product, Sum], jax.Array]
Biases = tuple[Float[Array, "hidden"], Float[Array, "hidden"], Float[Array, "d_out"]]

# "fused" keeps what has this name for the backward, beside its arguments.
KEPT_NAME = "jaxkern.masked"

# None picks the kernels for at least so many samples with masks of their own. Of the
# layer of 512 x 2048 with 256 tokens a sample, all gradients took on an H200 by the
# kernels 381 us of 16 samples and 77.4 us of one, by "bmm" 580 and 74.7, the forward
# 102 and 23.7 to 164 and 20.9 (`nvidia_h200/launches.json`, device time). Between one
# sample and 16: predicted, not measured.
KERNEL_LEAST_SAMPLES = 2
# And for so many tokens a sample: predicted, not measured. With fewer, launches take
# longer than the products; with more, the products longer than what masks save.
KERNEL_LEAST_TOKENS = 8
KERNEL_MOST_TOKENS = 2048

# On a GPU without our kernels None picks "bmm" as long as the masked weights of the
# batch take no more than this share of the device's memory: not measured. It keeps
# about 1.1 times their bytes at once, "fused" those of one sample.
BATCHED_MEMORY_SHARE = 0.125


# In the precision of w, which callers widen: the gradient of w is a sum over samples,
# and is rounded once.
def _masked(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    wide = jnp.expand_dims(w, range(mask.ndim - w.ndim))
    return (wide * mask.astype(w.dtype)).astype(x.dtype)


def _by_matmul(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    return matmul(x, _masked(x, w, mask))


def _by_einsum(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.einsum("bsd,bdm->bsm", x, _masked(x, w, mask))


def _by_bmm(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    # Without this barrier XLA computes the operand inside of the product.
    return jnp.matmul(x, lax.optimization_barrier(_masked(x, w, mask)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Masks:
    """The masks of a call, before they are made.

    logits: one for each weight, with an axis of samples or without.
    make: the estimator, from the logits of a sample to its mask; `unpack_mask` for
        packed masks.
    rule: that of the estimator, if the kernels know it and nothing is drawn.
    key: for an estimator that draws.
    """

    logits: Logits
    make: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    rule: Rule | None = dataclasses.field(metadata={"static": True})
    key: PRNGKeyArray | None

    @property
    def arrays(self) -> Arrays:
        return tuple(jax.tree.leaves(self.logits))

    @property
    def shared(self) -> bool:
        """Whether all samples have one mask."""
        return self.logits[0].ndim == 2

    @property
    def samples(self) -> int:
        """How many have masks of their own."""
        return 1 if self.shared else len(self.arrays[0])

    @property
    def packed(self) -> bool:
        return isinstance(self.logits[0], PackedMask)

    @cached_property
    def keys(self) -> jax.Array | None:
        """A key for each mask of each sample."""
        if self.key is None:
            return None
        keys = jax.random.split(self.key, (self.samples, len(self.logits)))
        return keys[0] if self.shared else keys

    def draw(self, logits: Logits, keys: jax.Array | None) -> Arrays:
        """The masks of one sample."""
        if keys is None:
            return tuple(map(self.make, logits))
        pairs = zip(logits, keys, strict=True)
        return tuple(self.make(one, key=key) for one, key in pairs)

    def draw_all(self) -> Arrays:
        """The masks of all samples."""
        draw = self.draw if self.shared else jax.vmap(self.draw)
        return draw(self.logits, self.keys)

    def for_kernels(self) -> tuple[Rule | Literal["mask", "bits"], Arrays]:
        """What the kernels make the masks of, and these arrays."""
        if self.packed:
            return "bits", self.arrays
        if self.rule is None:
            return "mask", self.draw_all()
        return self.rule, self.arrays


def _run(
    op: str,
    layer: Layer,
    x: jax.Array,
    parameters: Parameters,
    masks: _Masks,
    method: Method | None,
    implementation: Implementation | None,
) -> jax.Array:
    form = method or _fastest_method(x, parameters[0], masks)
    return run(
        _choose(op, x, parameters[0], masks, method, implementation),
        x,
        parameters,
        implementation=implementation,
        xla=partial(_by_xla, layer, masks=masks, method=form),
        kernel=partial(_in_kernels, layer, masks=masks),
    )


def _in_kernels(
    layer: Layer, x: jax.Array, parameters: Parameters, masks: _Masks
) -> jax.Array:
    # Mosaic is imported on first use of a kernel.
    from .hopper.multiply import add_bias, multiply

    kind, made = masks.for_kernels()
    return layer(x, parameters, made, partial(multiply, kind=kind), add_bias)


@on_automatic_axes(lambda x, parameters: product_spec(x, parameters[0][-1]))
def _by_xla(
    layer: Layer,
    x: Float[Array, "batch seq d_in"],
    parameters: Parameters,
    masks: _Masks,
    method: Method,
) -> Float[Array, "batch seq d_out"]:
    """`layer` of each sample and its masks.

    An estimator of the user's is called by every call: it may draw anew each time.
    """
    fixed = masks.packed or is_fixed(masks.make)
    compute: Any = _compiled_sample_by_sample if fixed else _sample_by_sample
    return compute(layer, x, parameters, masks, method)


def _sample_by_sample(layer, x, parameters, masks, method):
    def sample(x: jax.Array, logits: Logits, keys: jax.Array | None) -> jax.Array:
        return layer(x, parameters, masks.draw(logits, keys), _by_matmul, add)

    each = x, masks.logits, masks.keys
    if masks.shared:
        return sample(*each)
    match method:
        case "loop" if len(x):
            parts = [jax.tree.map(lambda a, b=b: a[b], each) for b in range(len(x))]
            return jnp.stack([sample(*part) for part in parts])
        case "einsum":
            return layer(x, parameters, masks.draw_all(), _by_einsum, add)
        case "bmm":
            return layer(x, parameters, masks.draw_all(), _by_bmm, add)
        case "loop" | "vmap":
            # A loop over no samples has nothing to stack.
            return jax.vmap(sample)(*each)
        case "fused":
            # The backward makes masked weights again: what one sample needs of them is
            # as large as a weight, and cheaper to make than to keep for all.
            policy = jax.checkpoint_policies.save_only_these_names(KEPT_NAME)
            one = jax.checkpoint(sample, prevent_cse=False, policy=policy)
            return lax.map(lambda part: one(*part), each)


_compiled_sample_by_sample = jax.jit(
    _sample_by_sample, static_argnames=("layer", "method")
)


def _choose(
    op: str,
    x: jax.Array,
    weights: Sequence[jax.Array],
    masks: _Masks,
    method: Method | None,
    implementation: Implementation | None,
) -> Implementation:
    """What multiplies: a pure function of shapes, dtypes, method and of the devices."""
    arrays = x, *weights, *masks.arrays

    def unsupported() -> str | None:
        # Mosaic is imported on first use of a kernel.
        from .hopper.multiply import unsupported

        if method not in (None, "fused"):
            return f"method must be None or 'fused' for mosaic_gpu, got {method!r}"
        return unsupported(x.dtype, [one.dtype for one in masks.arrays])

    tokens = len(x) * x.shape[1] // max(masks.samples, 1)
    enough = KERNEL_LEAST_TOKENS <= tokens <= KERNEL_MOST_TOKENS
    faster = masks.samples >= KERNEL_LEAST_SAMPLES and enough
    return choose(op, implementation, arrays, unsupported, faster)


def _fastest_method(
    x: jax.Array, weights: Sequence[jax.Array], masks: _Masks
) -> Method:
    """XLA's form for the default device.

    On an H200, all gradients of the layer of 512 x 2048, 16 samples and 256 tokens
    each took 579 us of device time by "bmm" and 1850 by "fused"; a call took 927 and
    2285 us by the wall (`nvidia_h200/estimators_quick.json`). On two CPU cores "fused"
    took 895 ms and "bmm" 918 (float32), with a quarter of the temporary memory.
    """
    if device.platform() != "gpu":
        return "fused"
    of_batch = masks.samples * sum(w.size for w in weights) * x.dtype.itemsize
    most = BATCHED_MEMORY_SHARE * device.memory_bytes()
    return "bmm" if of_batch <= most else "fused"


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
) -> _Masks:
    packed = [isinstance(one, PackedMask) for one in logits]
    if any(packed):
        for name, option in [("estimator", estimator), ("key", key)]:
            if option is not None:
                raise ValueError(f"{op}: {name} must be None for packed masks")
        if not all(packed):
            raise TypeError(f"{op}: mask_logits must be all packed, or none of them")
        return _Masks(logits, unpack_mask, None, None)
    make = estimator_of(op, estimator)
    _check_result(op, make, logits, key)
    return _Masks(logits, make, rule_of(make) if key is None else None, key)


def _check_result(
    op: str, make: Callable[..., Any], logits: Any, key: PRNGKeyArray | None
) -> None:
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

    The methods compute the same, values and gradients. None takes "fused" where the
    kernels run, and of XLA's forms "bmm" on a GPU and "fused" on other devices, and
    also where the masked weights of the batch would take more than an eighth of the
    GPU's memory:

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
      the estimator is `reinmax` or `straight_through`: by itself, by its name, or in a
      `functools.partial` that binds no more than defaults and
      `derivative="one_plus_sigmoid"`; and without a key. A backward of `x` or `w` reads
      the bits of such a mask, which its forward writes, and in which NaN is off; where
      the derivative depends on the logits, those that are trained are kept too. For any
      other estimator XLA computes the masks of all samples and keeps them, as it does
      their gradient, to which the estimator's is applied. Sizes that are no multiples
      of 8 tokens and 64 features are padded by copies. Gradients are deterministic, and
      of reverse mode only: `jax.jvp` needs "xla". Gradients that are not asked for are
      not computed. Under `vmap` the new axis joins the samples; an argument that lacks
      it is copied.

    None picks the kernel where it can run, for two and more samples with masks of their
    own and 8 to 2048 tokens each, on one device or inside `jax.shard_map`, and "xla"
    elsewhere: XLA cannot split a kernel over devices. On an H200 the kernel was
    measured to be faster with 16 samples and slower with one; the rest is predicted.

    Args:
        estimator: from logits (d_in, d_out) to a mask of their shape and dtype, such as
            `straight_through`, or the name of one of this library's estimators, such as
            "straight_through". It sees one sample, so it need not be elementwise.
        method: one of XLA's forms by its name, or None. The kernels are "fused".
        key: for estimators that draw, such as `reinmax`: each sample's call gets a
            `key` of its own, the same by every method. An estimator that holds a key
            itself draws the same noise for every sample.

    Raises:
        TypeError: an array is none or not floating-point, the dtypes of `x` and `w`
            differ, `estimator` is neither callable nor a name, or `key` is no key.
        ValueError: the shapes do not fit, the estimator returns something other than a
            mask like its logits, packed masks come with an estimator or a key, or the
            name of an estimator, `method` or `implementation` is unknown.
        NotImplementedError: "mosaic_gpu" cannot run these arguments here; it says why.
    """
    op = "masked_matmul"
    _check_options(op, method, implementation, key)
    x, w = check_floating(op, x=x, w=w)
    check_shape(op, "x", x, ("batch", "seq", "d_in"))
    check_shape(op, "w", w, (x.shape[2], "d_out"), f" for x of shape {x.shape}")
    shared = getattr(mask_logits, "ndim", None) == 2
    logits = _check_logits(op, "mask_logits", mask_logits, w, "x", x, shared)
    masks = _check_masks(op, (logits,), estimator, key)
    return _run(op, _linear, x, ((w,), None), masks, method, implementation)


def _linear(
    x: jax.Array, parameters: Parameters, masks: Arrays, product: Product, add: Sum
) -> jax.Array:
    return product(x, widen(parameters[0][0]), masks[0])


def _check_three(op: str, **tuples: Any) -> None:
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
    given = f" for x of shape {x.shape}"
    check_shape(op, "weights[0]", weights[0], (x.shape[2], "hidden"), given)
    check_shape(op, "weights[1]", weights[1], weights[0].shape)
    check_shape(op, "weights[2]", weights[2], (weights[0].shape[1], "d_out"))
    shared, logits = getattr(mask_logits[0], "ndim", None) == 2, []
    for i, (given, w) in enumerate(zip(mask_logits, weights, strict=True)):
        if biases is not None:
            check_shape(op, f"biases[{i}]", biases[i], w.shape[1:])
        name = f"mask_logits[{i}]"
        logits.append(_check_logits(op, name, given, w, "x", x, shared))
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

    Masks, `method`, `key` and `implementation` are as in `masked_matmul`; the biases
    are not masked. For the backward "fused" keeps the two products with `x`, both
    (batch, seq, hidden), and by the kernels what these are multiplied to as well:
    memory of activations, not of weights. Under `jax.checkpoint` it computes the two
    again, 11 products instead of 9; the kernels all three, for their masks' bits.

    A mask of zeros is safe but can be for ever: where all of $m_3$ is 0, $m_1$ and
    $m_2$ get no gradient, and $m_3$ gets one only if $b_1 \odot b_2$ or $m_1$ and
    $m_2$ are not 0.

    ```python
    >>> import jax.numpy as jnp, jaxkern
    >>> x = jnp.ones((2, 5, 4))
    >>> weights = jnp.ones((4, 8)), jnp.ones((4, 8)), jnp.ones((8, 3))
    >>> logits = tuple(jnp.ones((2, *w.shape)) for w in weights)
    >>> y = jaxkern.masked_bilinear(x, weights, logits, estimator="straight_through")
    >>> print(y.shape, y[0, 0])
    (2, 5, 3) [128. 128. 128.]

    ```

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
    x, parameters, logits = _check_bilinear(op, x, weights, mask_logits, biases)
    masks = _check_masks(op, logits, estimator, key)
    return _run(op, _bilinear, x, parameters, masks, method, implementation)


def _bilinear(
    x: jax.Array, parameters: Parameters, masks: Arrays, product: Product, add: Sum
) -> jax.Array:
    weights, biases = parameters

    def affine(features: jax.Array, i: int) -> jax.Array:
        y = product(features, widen(weights[i]), masks[i])
        return y if biases is None else add(y, widen(biases[i]))

    left, right = (checkpoint_name(affine(x, i), KEPT_NAME) for i in range(2))
    return affine(left * right, 2)
