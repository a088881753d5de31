"""Checks of attention's arguments, and the reasons why cuDNN cannot run some."""

import jax

from .._core.checks import (
    check_array,
    check_floating,
    check_number,
    check_shape,
    kind_of,
)

# The least number of queries for which None picks the kernel. A tile of the kernel
# holds 64 queries, so that one query over many keys would cost 64 times its work.
# Predicted, not measured.
LEAST_QUERIES = 64


def check_query_key_value(
    op: str, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, ...]:
    """Check shapes, dtypes and heads, and return the arrays as JAX's."""
    query, key, value = check_floating(op, query=query, key=key, value=value)
    check_shape(op, "query", query, ("batch", "seq_q", "heads", "dim"))
    batch, _, heads, dim = query.shape
    because = f" for query of shape {query.shape}"
    check_shape(op, "key", key, (batch, "seq_kv", "kv_heads", dim), because)
    because = f" for key of shape {key.shape}"
    check_shape(op, "value", value, (*key.shape[:3], "dim_v"), because)
    if heads % key.shape[2]:
        raise ValueError(
            f"{op}: heads of query must be a multiple of those of key and value, "
            f"got {heads} and {key.shape[2]}"
        )
    return query, key, value


def check_whole_sequence(op: str, **arrays: jax.Array) -> None:
    """Check that no mesh axis splits the tokens, as far as an array's type says."""
    for name, array in arrays.items():
        axis = jax.typeof(array).sharding.spec[1]
        if axis is not None:
            raise ValueError(
                f"{op}: the tokens of {name} must not be split over an explicit mesh "
                f"axis, got {axis!r}; context_parallel_attention takes such arrays"
            )


def check_one_length(op: str, query: jax.Array, key: jax.Array) -> None:
    """Check that queries and keys are of the same tokens."""
    because = f" for query of shape {query.shape}"
    check_shape(op, "key", key, (*query.shape[:2], *key.shape[2:]), because)


def check_scale(op: str, scale: float | None, dim: int) -> float:
    """Return the factor of the logits, dim ** -0.5 if `scale` is None."""
    if scale is None:
        return dim**-0.5
    check_number(op, "scale", scale)
    return float(scale)


def check_mask(op: str, mask: jax.Array, query: jax.Array, key: jax.Array) -> None:
    """Check that the mask has a boolean for each pair, or axes of 1."""
    if hasattr(mask, "to_dense"):
        raise TypeError(
            f"{op}: mask must be a boolean array, got a {kind_of(mask)}, which "
            "block_sparse_attention takes; its to_dense() is an array"
        )
    check_array(op, "mask", mask, "boolean")
    full = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
    fits = mask.ndim == 4 and all(
        got in (1, want) for got, want in zip(mask.shape, full, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{op}: mask must have four axes, (batch, heads, seq_q, seq_kv) = {full}, "
            f"each of which may be 1, got {mask.shape}"
        )


def check_key_mask(op: str, key_mask: jax.Array | None, shape: tuple[int, int]) -> None:
    """Check that the mask, if there is one, has a boolean for each key."""
    if key_mask is not None:
        check_array(op, "key_mask", key_mask, "boolean")
        check_shape(op, "key_mask", key_mask, shape)


def unsupported_by_cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    is_causal: bool,
    return_lse: bool,
) -> str | None:
    """Return why `jax.nn`'s cuDNN form does not compute `attention` here, or None."""
    if return_lse:
        return "return_lse must be False for cudnn, got True"
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    if device.platform != "gpu" or float(capability or 0) < 8:
        return (
            "cudnn needs an NVIDIA GPU of compute capability 8.0 or more, "
            f"got {device.device_kind}"
        )
    if query.dtype.itemsize != 2:
        return f"dtype must be bfloat16 or float16 for cudnn, got {query.dtype}"
    if mask is not None:
        return f"mask must be None for cudnn, got one of shape {mask.shape}"
    dim, limit = query.shape[-1], 256 if float(capability) >= 9 else 128
    if value.shape[-1] != dim or dim % 8 or dim > limit:
        return (
            f"dim and dim_v must be equal for cudnn, a multiple of 8 and at most "
            f"{limit}, got {dim} and {value.shape[-1]}"
        )
    if is_causal and query.shape[1] != key.shape[1]:
        return (
            "seq_q and seq_kv must be equal for cudnn with is_causal, "
            f"got {query.shape[1]} and {key.shape[1]}"
        )
    return None
