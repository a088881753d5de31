"""The one place that decides what runs: XLA, or a kernel."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
from jax import lax
from jax.core import Tracer

from . import device
from .checks import raise_unknown
from .sharding import explicit_axes, lie_whole

Implementation = Literal["xla", "mosaic_gpu"]


def check_implementation(
    op: str, implementation: object, valid: object = Implementation
) -> None:
    """`implementation` is None or one of the names in the Literal `valid`."""
    names = (None, *get_args(valid))
    if implementation not in names:
        raise_unknown(op, "implementation", implementation, names)


def choose(
    op: str,
    implementation: Implementation | None,
    arrays: Sequence[Any],
    unsupported: Callable[[], str | None],
    faster: bool = True,
) -> Implementation:
    """What runs an op, by shapes, dtypes, placement and device alone.

    A named implementation runs or raises. None picks the kernel if it supports the
    arguments, is faster for their shapes, the default device is a Hopper GPU, and each
    array lies whole on such a device, as it does inside `jax.shard_map`; XLA cannot
    split a kernel over devices.

    Args:
        arrays: what the kernel would read, arrays or shapes of arrays.
        unsupported: gives the reason why the kernel cannot take these arguments, or
            None. It is asked only where the answer matters.
        faster: whether the kernel was measured, or is predicted, to take less time than
            XLA forward and backward.

    Raises:
        NotImplementedError: the kernel is named and cannot run; the message says why.
    """
    if implementation == "xla":
        return "xla"
    named = implementation is not None
    here = device.on_hopper() and device.holds(*arrays) and lie_whole(*arrays)
    if not named and not (faster and here):
        return "xla"
    # Without the device no other arguments would help.
    reason = device.unsupported() or unsupported() or explicit_axes(*arrays)
    if reason and named:
        raise NotImplementedError(f"{op}: {reason}")
    return "xla" if reason else "mosaic_gpu"


def run[*Arrays, Out](
    chosen: Implementation,
    *arrays: *Arrays,
    implementation: Implementation | None,
    xla: Callable[[*Arrays], Out],
    kernel: Callable[[*Arrays], Out],
) -> Out:
    """`kernel` or `xla` of `arrays`, as `choose` has chosen for `implementation`.

    A traced array has no device yet: a program that is traced where the default device
    is a Hopper GPU may be compiled for arrays on the CPU, or be exported for both. So
    where None picked the kernel for traced arrays, the program holds both forms, and
    the platform that it is lowered for picks one of them.
    """
    if chosen == "xla":
        return xla(*arrays)
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(arrays))
    if implementation is None and traced:
        return lax.platform_dependent(*arrays, cpu=xla, default=kernel)
    return kernel(*arrays)
