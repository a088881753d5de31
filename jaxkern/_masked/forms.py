"""The forms of a layer with masks: XLA's, which `method` names, and the kernels'."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .._core import device
from .._core.dispatch import Implementation, run
from .._core.precision import add, matmul
from .._core.sharding import on_automatic_axes, product_spec
from .estimators import Rule, is_fixed
from .packed import PackedMask

Method = Literal["loop", "einsum", "bmm", "vmap", "fused"]
Arrays = tuple[jax.Array, ...]
Logits = tuple[jax.Array | PackedMask, ...]
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Sum = Callable[[jax.Array, jax.Array], jax.Array]
# The weights, and their biases or None.
Parameters = tuple[Arrays, Arrays | None]
# Maps an input, parameters, masks, a product and a sum to the output.
Layer = Callable[[jax.Array, Parameters, Arrays, Product, Sum], jax.Array]
# The form "fused" saves the values of this name for its backward pass, and its
# arguments.
KEPT_NAME = "jaxkern.masked"
# The least number of samples with masks of their own for which None picks the kernels.
# Device time on an H200 (`nvidia_h200/launches.json`) for the layer of 512 x 2048 with
# 256 tokens a sample, kernels against "bmm":
#   16 samples: forward 102 us and 164 us, all gradients 381 us and 580 us;
#   1 sample: forward 23.7 us and 20.9 us, all gradients 77.4 us and 74.7 us.
# Between 1 and 16 samples: predicted, not measured.
KERNEL_LEAST_SAMPLES = 2
# The least number of tokens a sample for the kernels: with fewer, launches take longer
# than products. Predicted, not measured.
KERNEL_LEAST_TOKENS = 8
# The largest number: with more, products take so long that masks do not matter.
# Predicted, not measured.
KERNEL_MOST_TOKENS = 2048
# The share of the device's memory that the masked weights of a batch may take if None
# is to pick "bmm" on a GPU without our kernels: not measured. "bmm" keeps about 1.1
# times the bytes of these weights at once, and "fused" the weights of one sample.
BATCHED_MEMORY_SHARE = 0.125


def _masked(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the masked weight in the dtype of `x`.

    `w` comes in float32 or wider, so that its gradient, a sum over samples, is rounded
    once.
    """
    wide = jnp.expand_dims(w, range(mask.ndim - w.ndim))
    return (wide * mask.astype(w.dtype)).astype(x.dtype)


def _by_matmul(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    return matmul(x, _masked(x, w, mask))


def _by_einsum(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.einsum("bsd,bdm->bsm", x, _masked(x, w, mask))


def _by_bmm(x: jax.Array, w: jax.Array, mask: jax.Array) -> jax.Array:
    # Without this barrier XLA fuses the masking into the product.
    return jnp.matmul(x, lax.optimization_barrier(_masked(x, w, mask)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """The masks of a call, before they are made.

    Attributes:
        logits: One array for each weight, with an axis of samples or without.
        make: The estimator, from the logits of a sample to its mask; `unpack_mask` for
            packed masks.
        rule: The kernels' rule for the estimator; None if they have none or if the
            estimator draws.
        key: The random key of an estimator that draws.
    """

    logits: Logits
    make: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    rule: Rule | None = dataclasses.field(metadata={"static": True})
    key: PRNGKeyArray | None

    @property
    def arrays(self) -> Arrays:
        """The arrays that the masks are made of."""
        return tuple(jax.tree.leaves(self.logits))

    @property
    def shared(self) -> bool:
        """Whether all samples have one mask."""
        return self.logits[0].ndim == 2

    @property
    def samples(self) -> int:
        """The number of samples that have masks of their own."""
        return 1 if self.shared else len(self.arrays[0])

    @property
    def packed(self) -> bool:
        """Whether the masks are packed."""
        return isinstance(self.logits[0], PackedMask)

    @cached_property
    def keys(self) -> jax.Array | None:
        """A key for each mask of each sample."""
        if self.key is None:
            return None
        keys = jax.random.split(self.key, (self.samples, len(self.logits)))
        return keys[0] if self.shared else keys

    def draw(self, logits: Logits, keys: jax.Array | None) -> Arrays:
        """Make the masks of one sample."""
        if keys is None:
            return tuple(map(self.make, logits))
        pairs = zip(logits, keys, strict=True)
        return tuple(self.make(one, key=key) for one, key in pairs)

    def draw_all(self) -> Arrays:
        """Make the masks of all samples."""
        draw = self.draw if self.shared else jax.vmap(self.draw)
        return draw(self.logits, self.keys)

    def for_kernels(self) -> tuple[Rule | Literal["mask", "bits"], Arrays]:
        """Return the kernels' rule for making masks, and the arrays to make them of."""
        if self.packed:
            return "bits", self.arrays
        if self.rule is None:
            return "mask", self.draw_all()
        return self.rule, self.arrays


def run_layer(
    op: str,
    layer: Layer,
    x: jax.Array,
    parameters: Parameters,
    masks: Masks,
    method: Method | None,
    implementation: Implementation | None,
) -> jax.Array:
    """Run the layer in the kernels or by one of XLA's forms."""

    def unsupported() -> str | None:
        # Mosaic is imported on first use of a kernel.
        from .hopper.multiply import unsupported

        if method not in (None, "fused"):
            return f"method must be None or 'fused' for mosaic_gpu, got {method!r}"
        return unsupported(x.dtype, [one.dtype for one in masks.arrays])

    tokens = len(x) * x.shape[1] // max(masks.samples, 1)
    enough = KERNEL_LEAST_TOKENS <= tokens <= KERNEL_MOST_TOKENS
    form = method or _fastest_method(x, parameters[0], masks)
    return run(
        op,
        implementation,
        x,
        parameters,
        xla=partial(_by_xla, layer, masks=masks, method=form),
        kernel=partial(_in_kernels, layer, masks=masks),
        unsupported=unsupported,
        faster=masks.samples >= KERNEL_LEAST_SAMPLES and enough,
        held=masks.arrays,
    )


def _in_kernels(
    layer: Layer, x: jax.Array, parameters: Parameters, masks: Masks
) -> jax.Array:
    """Run the layer with the kernels' product."""
    # Mosaic is imported on first use of a kernel.
    from .hopper.multiply import add_bias, multiply

    kind, made = masks.for_kernels()
    return layer(x, parameters, made, partial(multiply, kind=kind), add_bias)


@on_automatic_axes(lambda x, parameters: product_spec(x, parameters[0][-1]))
def _by_xla(
    layer: Layer,
    x: Float[Array, "batch seq d_in"],
    parameters: Parameters,
    masks: Masks,
    method: Method,
) -> Float[Array, "batch seq d_out"]:
    """Run the layer for each sample and its masks.

    A call with the user's own estimator runs it each time, since it may draw anew.
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
            # The backward pass computes masked weights again: that is cheaper than to
            # keep an array of the weight's size for every sample.
            policy = jax.checkpoint_policies.save_only_these_names(KEPT_NAME)
            one = jax.checkpoint(sample, prevent_cse=False, policy=policy)
            return lax.map(lambda part: one(*part), each)


_compiled_sample_by_sample = jax.jit(
    _sample_by_sample, static_argnames=("layer", "method")
)


def _fastest_method(x: jax.Array, weights: Sequence[jax.Array], masks: Masks) -> Method:
    """Return XLA's fastest form on the default device.

    On an H200, all gradients of the layer of 512 x 2048, 16 samples and 256 tokens
    each, took 579 us of device time by "bmm" and 1850 us by "fused"; a call took 927
    and 2285 us of wall time (`nvidia_h200/estimators_quick.json`). On two CPU cores
    "fused" took 895 ms and "bmm" 918 ms in float32, and "fused" a quarter of the
    temporary memory.
    """
    if device.platform() != "gpu":
        return "fused"
    of_batch = masks.samples * sum(w.size for w in weights) * x.dtype.itemsize
    most = BATCHED_MEMORY_SHARE * device.memory_bytes()
    return "bmm" if of_batch <= most else "fused"
