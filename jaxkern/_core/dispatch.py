"""The one place that decides what runs: XLA, or a kernel."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
from jax.core import Tracer

from . import device
from .checks import raise_unknown

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
    arguments, is faster for their shapes, and each array lies whole on one Hopper GPU,
    as it does inside `jax.shard_map`; XLA cannot split a kernel over devices.

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
    if not named and not (faster and device.on_hopper() and lie_whole(*arrays)):
        return "xla"
    reason = unsupported() or device.unsupported()
    if reason and named:
        raise NotImplementedError(f"{op}: {reason}")
    return "xla" if reason else "mosaic_gpu"


def lie_whole(*arrays: Any) -> bool:
    """Whether one device has each array whole, or this is the body of a `shard_map`.

    The types of arrays name the mesh that they are spread over, under `jax.jit` too.
    `jax.jit(in_shardings=...)` alone does not tell its body, and a kernel in it is
    given whole copies of its arguments on each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # References inside a Pallas kernel carry no sharding, so arrays on explicit
        # axes cannot be passed to one.
        return not mesh.explicit_axes and (mesh.are_all_axes_manual or mesh.size == 1)
    return not any(map(_is_spread, arrays))


def _is_spread(x: Any) -> bool:
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return len(x.sharding.device_set) > 1
    mesh = getattr(jax.typeof(x), "sharding", None)
    return mesh is not None and mesh.mesh.size > 1
