"""The placement of arrays on a mesh, which kernels and custom gradients depend on."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    PartitionSpec,
    reshard,
    use_abstract_mesh,
)


def lie_whole(*arrays: Any) -> bool:
    """Whether each array lies whole on one device, or this is inside a `shard_map`.

    The type of an array names the mesh that it is spread over, under `jax.jit` too. But
    `jax.jit(in_shardings=...)` alone does not show in the types, and XLA gives a kernel
    in such a program whole copies of its arguments on each device.
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
    """Return why a kernel cannot take arrays on explicit mesh axes, or None.

    The references inside a Pallas kernel carry no sharding.
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
    """Make all arrays vary over the mesh axes that any of them varies over.

    This matters inside `jax.shard_map`. The gradients of a custom VJP vary over all of
    these axes, and must have the types of its arguments. The results of a kernel carry
    no such axes: they are given those of the arrays in `like`.
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
    place: Callable[..., Any],
) -> Callable[[Callable[In, Out]], Callable[In, Out]]:
    """Decorate a function so that it runs on automatic axes in place of explicit ones.

    XLA then chooses how to split the intermediate arrays. `place` returns where the
    results lie, a `PartitionSpec` for each array or for each tree of arrays. Its
    parameters are those arguments of the function whose specs it needs, and it gets one
    spec for each of their arrays. An axis that the devices cannot split evenly lies
    whole on each of them.
    """
    wanted = tuple(inspect.signature(place).parameters)

    def decorate(function: Callable[In, Out]) -> Callable[In, Out]:
        signature = inspect.signature(function)

        @wraps(function)
        def run(*args: In.args, **options: In.kwargs) -> Out:
            leaves, tree = jax.tree.flatten((args, options))
            arrays = [x for x in leaves if isinstance(x, jax.Array)]
            meshes = (jax.typeof(x).sharding.mesh for x in arrays)
            mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
            # Inside `jax.shard_map` the user places the arrays, and there JAX 0.12
            # fails to save scalars that were computed on automatic axes.
            if mesh is None or mesh.manual_axes:
                return function(*args, **options)
            given = signature.bind(*args, **options).arguments
            specs = jax.tree.map(_spec, {name: given[name] for name in wanted})
            kinds = dict.fromkeys(mesh.explicit_axes, AxisType.Auto)
            with use_abstract_mesh(mesh.update_axis_types(kinds)):
                inputs, named = jax.tree.unflatten(tree, map(_on_no_axis, leaves))
                call: Callable[..., Any] = function
                results = call(*inputs, **named)
            with use_abstract_mesh(mesh):
                return jax.tree.map(
                    lambda spec, part: jax.tree.map(partial(_move, spec, mesh), part),
                    place(**specs),
                    results,
                    is_leaf=lambda x: isinstance(x, PartitionSpec),
                )

        return run

    return decorate


def product_spec(x: PartitionSpec, w: PartitionSpec) -> PartitionSpec:
    """Return the placement of `x @ w`: the batch axes of `x` and the columns of `w`.

    A mesh axis that splits the batch cannot split the columns too.
    """
    taken = {name for axis in x[:-1] for name in _mesh_axes(axis)}
    last = None if taken & {*_mesh_axes(w[-1])} else w[-1]
    return PartitionSpec(*x[:-1], last)


def _spec(x: Any) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def _on_no_axis(x: Any) -> Any:
    return reshard(x, PartitionSpec()) if isinstance(x, jax.Array) else x


def _move(spec: PartitionSpec, mesh: AbstractMesh, x: jax.Array) -> jax.Array:
    axes = [
        axis
        if size % math.prod(mesh.shape[name] for name in _mesh_axes(axis)) == 0
        else None
        for axis, size in zip(spec, x.shape, strict=False)
    ]
    return reshard(x, PartitionSpec(*axes))


def _mesh_axes(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    match axis:
        case None:
            return ()
        case str():
            return (axis,)
        case _:
            return axis
