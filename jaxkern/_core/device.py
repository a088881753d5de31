"""The default device: the only place that tests replace to stand for a Hopper GPU."""

import math
from typing import Any

import jax
from jax._src.lib import cuda_versions
from jax.core import Tracer

# wgmma takes float32 only as tf32, and not from transposed views of shared memory.
KERNEL_DTYPES = ("bfloat16", "float16")
# Of an H100 with SXM and of an H200; for devices that do not say.
MULTIPROCESSORS = 132


def default() -> Any:
    """Where JAX computes if nobody says otherwise: as `jax.default_device` has it."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.devices(chosen)[0]


def holds(*arrays: Any) -> bool:
    """Whether arrays with values lie on devices like the default one.

    Traced ones have no place yet, and come to the default device.
    """
    placed = [
        x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, Tracer)
    ]
    found = {one.platform for x in placed for one in x.sharding.device_set}
    return found <= {platform()}


def multiprocessors() -> int:
    """How many blocks run at once, one on each."""
    return getattr(default(), "core_count", MULTIPROCESSORS)


def on_hopper() -> bool:
    """Whether the default device is an H100, an H200 or one like them."""
    device = default()
    capability = getattr(device, "compute_capability", "")
    return device.platform == "gpu" and capability.startswith("9.")


def platform() -> str:
    """The default device's platform: "cpu", "gpu" or "tpu"."""
    return default().platform


def memory_bytes() -> float:
    """The default device's memory as JAX may use it; infinite where it does not say."""
    stats = default().memory_stats() or {}
    return stats.get("bytes_limit", math.inf)


def miscompiled() -> str | None:
    """Why this CUDA must not compile a kernel with masks, or None.

    The ptxas of 12.8.0 to 12.9.0 gets comparisons of positions wrong.
    """
    # jax's own kernels ask here; without a GPU there is nothing to ask.
    versions: Any = cuda_versions
    version = versions.cuda_runtime_get_version() if versions else 0
    if 12080 <= version < 12091:
        number = f"{version // 1000}.{version % 1000 // 10}.{version % 10}"
        return (
            "mosaic_gpu needs a CUDA before 12.8.0 or from 12.9.1 on, whose ptxas "
            f"compiles masks right, got {number}"
        )
    return None


def unsupported_dtype(dtype: Any) -> str | None:
    """Why Hopper kernels cannot take arrays of this dtype, or None if they can."""
    if str(dtype) in KERNEL_DTYPES:
        return None
    return f"dtype must be {' or '.join(KERNEL_DTYPES)} for mosaic_gpu, got {dtype}"


def unsupported() -> str | None:
    """Why the default device cannot run a Hopper kernel, or None if it can."""
    if on_hopper():
        return None
    kind = default().device_kind
    return f"mosaic_gpu needs an H100 or H200, but the default device is {kind}"


def unsupported_array(name: str, array: Any) -> str | None:
    """Why Hopper kernels of matmuls cannot take this argument, or None if they can."""
    if reason := unsupported_dtype(array.dtype):
        return reason
    if 0 in array.shape:
        return f"no axis of {name} may be empty for mosaic_gpu, got {array.shape}"
    return None
