"""Weight masks as bits, 32 to a word: for inference with masks that no longer learn."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from .._core.checks import check_floating, check_shape, kind_of
from .._core.sharding import on_automatic_axes
from .._core.trees import ArrayTree, register

# Bits of a word.
WORD = 32


@register
@dataclass(frozen=True, eq=False)
class PackedMask(ArrayTree):
    """A mask over weights (d_in, d_out), or one for each sample, stored as bits.

    `pack_mask` makes it, and `masked_matmul` and `masked_bilinear` take it in the place
    of logits. It is a pytree whose only array is `words`, so `jax.tree.map(lambda
    words: words[:batch], packed)` selects the first samples' masks. Two are equal if
    their words are. It pickles, and `jax.export` serializes it.

    Attributes:
        words: uint32 (..., ceil(d_in / 32), d_out). Bit i of word j is for input
            feature 32 j + i; the bits past the last feature are 0.
        d_in: The number of input features, a Python integer.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        packed = jaxkern.pack_mask(jnp.array([[True], [False], [True]]))
        print(packed.words, packed.d_in)
        ```
        ```text
        [[5]] 3
        ```
    """

    words: jax.Array
    d_in: int = field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        """The number of axes of the mask."""
        return self.words.ndim


def pack_mask(
    mask: Bool[Array, "*batch d_in d_out"] | Float[Array, "*batch d_in d_out"],
) -> PackedMask:
    r"""Store a mask in a thirty-second of the bytes of float32.

    $$m_{ij} = 1[\mathrm{mask}_{ij} > 0]$$

    A weight is on where the mask is True or above 0. So the logits of a mask, their
    `straight_through` and their comparison with 0 are packed alike. There is no
    gradient.

    Args:
        mask: A mask, or the logits of one.

    Returns:
        The packed mask.

    Raises:
        TypeError: `mask` is neither a boolean nor a floating-point array.
        ValueError: `mask` has fewer than two axes.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        logits = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
        print(jaxkern.unpack_mask(jaxkern.pack_mask(logits)))
        ```
        ```text
        [[ True False]
         [False  True]]
        ```
    """
    op = "pack_mask"
    boolean = isinstance(mask, jax.Array | np.ndarray) and mask.dtype == bool
    if not boolean:
        (mask,) = check_floating(op, mask=mask)
    if mask.ndim < 2:
        raise ValueError(
            f"{op}: mask must have shape (..., d_in, d_out), got {mask.shape}"
        )
    return PackedMask(_pack(jnp.asarray(mask)), mask.shape[-2])


@on_automatic_axes(lambda mask: mask)
@jax.jit
def _pack(
    mask: Bool[Array, "*batch d_in d_out"] | Float[Array, "*batch d_in d_out"],
) -> UInt32[Array, "*batch words d_out"]:
    *batch, d_in, d_out = mask.shape
    count = -(-d_in // WORD)
    missing = [(0, 0)] * len(batch) + [(0, count * WORD - d_in), (0, 0)]
    bits = mask if mask.dtype == bool else mask > 0
    bits = jnp.pad(bits, missing, constant_values=False)
    bits = bits.reshape(*batch, count, WORD, d_out).astype(jnp.uint32)
    # Each bit has its own place, so the sum of the shifted bits is the word.
    return (bits << _places(bits.ndim)).sum(-2, dtype=jnp.uint32)


def _places(ndim: int) -> jax.Array:
    """Return the place of each bit in its word, along the last axis but one."""
    places = jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.expand_dims(places, (*range(ndim - 2), ndim - 1))


def unpack_mask(packed: PackedMask) -> Bool[Array, "*batch d_in d_out"]:
    r"""Return the boolean mask that was packed.

    $$\mathrm{unpack}(\mathrm{pack}(m)) = m$$

    Args:
        packed: The packed mask.

    Returns:
        The mask, True where a weight is on.

    Raises:
        TypeError: `packed` is not a `PackedMask`, or its words are not uint32.
        ValueError: The words do not fit `d_in`.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        mask = jnp.array([[True, False], [False, True]])
        assert jnp.array_equal(jaxkern.unpack_mask(jaxkern.pack_mask(mask)), mask)
        ```
    """
    packed = check_packed_mask("unpack_mask", "packed", packed)
    return _unpack(packed.words, packed.d_in)


@on_automatic_axes(lambda words: words)
@partial(jax.jit, static_argnames="d_in")
def _unpack(
    words: UInt32[Array, "*batch words d_out"], d_in: int
) -> Bool[Array, "*batch d_in d_out"]:
    *batch, count, d_out = words.shape
    words = words[..., None, :]
    bits = (words >> _places(words.ndim)) & 1
    return bits.reshape(*batch, count * WORD, d_out)[..., :d_in, :] > 0


def check_packed_mask(op: str, name: str, packed: Any) -> PackedMask:
    """Check that `packed` has the dtype and shape that `pack_mask` gives its words.

    Returns:
        It with JAX's array.
    """
    if not isinstance(packed, PackedMask):
        kind = kind_of(packed)
        raise TypeError(f"{op}: {name} must be a PackedMask, got {kind}")
    words = packed.words
    if not isinstance(words, jax.Array | np.ndarray) or words.dtype != np.uint32:
        got = getattr(words, "dtype", type(words).__name__)
        raise TypeError(f"{op}: words of {name} must be uint32, got {got}")
    if words.ndim < 2:
        raise ValueError(
            f"{op}: words of {name} must have shape (..., words, d_out), "
            f"got {words.shape}"
        )
    count = -(-packed.d_in // WORD)
    because = f" for d_in = {packed.d_in}"
    expected = *words.shape[:-2], count, words.shape[-1]
    check_shape(op, f"words of {name}", words, expected, because)
    return PackedMask(jnp.asarray(words), packed.d_in)
