"""Where arrays lie on a mesh, as kernels and custom gradients need to know it."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec


def lie_whole(*arrays: Any) -> bool:
    """Whether one device has each array whole, or this is the body of a `shard_map`.

    The types of arrays name the mesh that they are spread over, under `jax.jit` too.
    `jax.jit(in_shardings=...)` alone does not tell its body, and a kernel in it is
    given whole copies of its arguments on each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return not mesh.explicit_axes and (mesh.are_all_axes_manual or mesh.size == 1)
    return all(map(_lies_whole, arrays))


def _lies_whole(x: Any) -> bool:
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return len(x.sharding.device_set) == 1
    return jax.typeof(x).sharding.mesh.size <= 1


def explicit_axes(*arrays: Any) -> str | None:
    """Why a kernel cannot take arrays on explicit mesh axes, or None if there are none.

    References inside a Pallas kernel carry no sharding.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(x).sharding.mesh for x in arrays]
    axes = next((mesh.explicit_axes for mesh in meshes if mesh.explicit_axes), None)
    if axes is None:
        return None
    return (
        "arrays must not lie on explicit mesh axes for mosaic_gpu, "
        f"got {', '.join(map(repr, axes))}; call it inside jax.shard_map"
    )


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


def on_automatic_axes[**In, Out](
    place: Callable[[PartitionSpec], Any],
) -> Callable[[Callable[In, Out]], Callable[In, Out]]:
    """Where arguments lie on explicit axes, the function runs on automatic ones.

    XLA then chooses how to split what is between, as a large model needs. `place` says
    where the results lie, from where the second argument does: a method's first one
    after `self`.
    """

    def decorate(method: Callable[In, Out]) -> Callable[In, Out]:
        @wraps(method)
        def run(*args: In.args, **options: In.kwargs) -> Out:
            leaves, tree = jax.tree.flatten((args, options))
            is_array = [isinstance(x, jax.Array) for x in leaves]
            arrays = [x for x in leaves if isinstance(x, jax.Array)]
            meshes = (jax.typeof(x).sharding.mesh for x in arrays)
            mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
            if mesh is None:
                return method(*args, **options)

            def inside(*arrays: jax.Array) -> Any:
                given = iter(arrays)
                pairs = zip(is_array, leaves, strict=True)
                filled = [next(given) if array else x for array, x in pairs]
                call: Callable[..., Any] = method
                inputs, named = jax.tree.unflatten(tree, filled)
                return call(*inputs, **named)

            first = jax.tree.leaves(args[1])[0]
            places = place(jax.typeof(first).sharding.spec)
            automatic: Any = jax.sharding.auto_axes(inside, out_sharding=places)
            with jax.sharding.use_abstract_mesh(mesh):
                return automatic(*arrays)

        return run

    return decorate
