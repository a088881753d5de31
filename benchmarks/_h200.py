"""Floors of one H200, by its data sheet: predicted, and below what any kernel takes."""

from collections.abc import Mapping

from jaxkern._core import device, h200

# Dense matmuls of 16-bit numbers.
TENSOR_FLOPS_PER_US = 989e6
# Special function operations (exp2, tanh, reciprocal) of one multiprocessor.
MUFU_PER_CLOCK = 16
MUFU_PER_US = device.MULTIPROCESSORS * MUFU_PER_CLOCK * h200.CLOCKS_PER_US


def floors_us(
    flops: float, moved_bytes: float, special: float | None = None
) -> dict[str, float]:
    """Microseconds by cause: matmuls, bytes and, if given, special functions."""
    floors = {
        "tensor": flops / TENSOR_FLOPS_PER_US,
        "bytes": moved_bytes / h200.MEMORY_BYTES_PER_US,
    }
    return floors | ({} if special is None else {"mufu": special / MUFU_PER_US})


def percent_of_floor(row: Mapping) -> float | None:
    """The largest floor of a row, over the time that its kernels alone took."""
    if not row.get("device_ms") or not row.get("floors_us"):
        return None
    return 100 * max(row["floors_us"].values()) / (1e3 * row["device_ms"])
