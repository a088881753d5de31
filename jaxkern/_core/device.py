"""Facts about the default device. Tests replace these functions to emulate a GPU."""

import math
from typing import Any

import jax
from jax._src.lib import cuda_versions
from jax.core import Tracer

# The instruction wgmma takes float32 only as tf32, and then only from shared memory
# that is not transposed. So kernels take 16-bit arrays.
KERNEL_DTYPES = ("bfloat16", "float16")
# An H100 with SXM and an H200 have this many. It stands for a device that does not say.
MULTIPROCESSORS = 132


def default() -> Any:
    """Return JAX's default device, which `jax.default_device` sets."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.devices(chosen)[0]


def holds(*arrays: Any) -> bool:
    """Whether arrays with values lie on devices of the default device's platform.

    A traced array has no device yet, and is assumed to come to the default device.
    """
    placed = [
        x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, Tracer)
    ]
    found = {one.platform for x in placed for one in x.sharding.device_set}
    return found <= {platform()}


def multiprocessors() -> int:
    """Return the number of multiprocessors, each of which runs one block at a time."""
    return getattr(default(), "core_count", MULTIPROCESSORS)


def on_hopper() -> bool:
    """Whether the default device is an H100, an H200 or one like them."""
    device = default()
    capability = getattr(device, "compute_capability", "")
    return device.platform == "gpu" and capability.startswith("9.")


def platform() -> str:
    """Return the platform of the default device: "cpu", "gpu" or "tpu"."""
    return default().platform


def memory_bytes() -> float:
    """Return the memory that JAX may use on the default device; infinite if unknown."""
    stats = default().memory_stats() or {}
    return stats.get("bytes_limit", math.inf)


def miscompiled() -> str | None:
    """Return why this version of CUDA must not compile masked kernels, or None.

    The ptxas of CUDA 12.8.0 to 12.9.0 compiles comparisons of positions wrongly.
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
    """Return why Hopper kernels cannot take arrays of this dtype, or None."""
    if str(dtype) in KERNEL_DTYPES:
        return None
    return f"dtype must be {' or '.join(KERNEL_DTYPES)} for mosaic_gpu, got {dtype}"


def unsupported() -> str | None:
    """Return why the default device cannot run a Hopper kernel, or None."""
    if on_hopper():
        return None
    kind = default().device_kind
    return f"mosaic_gpu needs an H100 or H200, but the default device is {kind}"


def unsupported_array(name: str, array: Any) -> str | None:
    """Return why the Hopper kernels of matmuls cannot take this array, or None."""
    if reason := unsupported_dtype(array.dtype):
        return reason
    if 0 in array.shape:
        return f"no axis of {name} may be empty for mosaic_gpu, got {array.shape}"
    return None
