"""The norms of the language model."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from .._core.precision import widen
from ._common import axis_metadata

NormKind = Literal["rms", "rms_plus_one", "layer"]


class RMSNormPlusOne(nnx.Module):
    """RMSNorm whose scale is stored less 1, and starts at 0."""

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        scale_metadata: dict[str, Any],
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Param(jnp.zeros(features, param_dtype), **scale_metadata)
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        dtype = self.dtype or jnp.promote_types(x.dtype, self.scale[...].dtype)
        wide, scale = widen(x), widen(self.scale[...])
        both = jnp.promote_types(wide.dtype, scale.dtype)
        wide, scale = wide.astype(both), scale.astype(both)
        root = lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(1 + scale, range(x.ndim - 1))
        return (wide * root * scale).astype(dtype)


def make_norm(
    features: int,
    *,
    kind: NormKind,
    epsilon: float,
    axis: str | None = "embed",
    **dtypes: Any,
) -> nnx.Module:
    """Make a norm over the last axis, whose parameters have the logical axis `axis`."""
    metadata = axis_metadata(axis)
    options = {"epsilon": epsilon, "scale_metadata": metadata, **dtypes}
    match kind:
        case "rms":
            return nnx.RMSNorm(features, **options)
        case "rms_plus_one":
            return RMSNormPlusOne(features, **options)
        case "layer":
            return nnx.LayerNorm(features, bias_metadata=metadata, **options)
