"""The one place that decides whether XLA or a kernel computes an op."""

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
    """Check that `implementation` is None or a name in the Literal `valid`."""
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
    """Choose what runs an op, by shapes, dtypes, placement and device alone.

    A named implementation runs or raises. None picks the kernel if four conditions
    hold: the kernel supports the arguments; it is faster for their shapes; the default
    device is a Hopper GPU; and each array lies whole on one such device, as it does
    inside `jax.shard_map`. XLA cannot split a kernel over devices.

    Args:
        arrays: the arrays that the kernel would read, or their shapes and dtypes.
        unsupported: returns the reason why the kernel cannot take these arguments, or
            None. It is called only if the answer matters.
        faster: whether the kernel was measured, or is predicted, to take less time than
            XLA for forward and backward.

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
    op: str,
    implementation: Implementation | None,
    *arrays: *Arrays,
    xla: Callable[[*Arrays], Out],
    kernel: Callable[[*Arrays], Out],
    unsupported: Callable[[], str | None],
    faster: bool = True,
    held: Sequence[Any] = (),
) -> Out:
    """Apply `kernel` or `xla` to the arrays, as `choose` says.

    A traced array has no device yet. A program that is traced where the default device
    is a Hopper GPU may still be compiled for arrays on the CPU, or be exported for it.
    Therefore, if None picks the kernel and an array is traced, the program holds both
    forms, and the platform that JAX lowers it for picks one. XLA never sees the other
    form, so it costs no time and no memory. JAX lowers no Mosaic kernel for several
    platforms at once.

    Args:
        arrays: The arguments of `xla` and `kernel`, arrays or trees of them.
        unsupported: As in `choose`.
        faster: As in `choose`.
        held: Arrays that `xla` and `kernel` hold themselves.

    Raises:
        NotImplementedError: As in `choose`.
    """
    leaves = [*jax.tree.leaves(arrays), *held]
    if choose(op, implementation, leaves, unsupported, faster) == "xla":
        return xla(*arrays)
    if implementation is None and any(isinstance(x, Tracer) for x in leaves):
        return lax.platform_dependent(*arrays, cpu=xla, default=kernel)
    return kernel(*arrays)
