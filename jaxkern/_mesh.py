"""Where arrays lie on a mesh, as kernels and custom gradients need to know it."""

from collections.abc import Sequence

import jax
from jax import lax


def runs_locally() -> bool:
    """Whether an op sees one device's arrays whole: XLA cannot split a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)


def vary_alike(
    *arrays: jax.Array, like: Sequence[jax.Array] = ()
) -> tuple[jax.Array, ...]:
    """Inside shard_map: all vary over the mesh axes that any of them varies over.

    A custom VJP needs that of its arguments, since its gradients do vary and must have
    the same types; and a kernel does not say it of its results, which are `like` those.
    """

    def varying(x: jax.Array) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    union = frozenset[str]().union(*map(varying, (*arrays, *like)))
    missing = [tuple(union - varying(x)) for x in arrays]
    return tuple(
        lax.pcast(x, axes, to="varying") if axes else x
        for x, axes in zip(arrays, missing, strict=True)
    )
