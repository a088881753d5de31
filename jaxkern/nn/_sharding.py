"""Where a model's parameters and its work lie on a mesh of devices."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, TypedDict

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .._attention.dense import attention
from .._attention.ring import ring_attention
from .._core.checks import check_integer

# From what needs a link least to what needs it most: neighbours are the last axis.
AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")

SHARDING_RULES: tuple[tuple[str, str | None], ...] = (
    ("layers", None),
    ("embed", "fsdp"),
    ("rank", None),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
)


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The devices as a mesh of the axes "data", "fsdp", "context" and "tensor".

    The batch is split over "data" and "fsdp", parameters over "fsdp" and "tensor" (see
    `SHARDING_RULES`), the tokens of a sequence over "context". The axes are automatic.

    ```python
    >>> import jax
    >>> from jaxkern import nn
    >>> mesh = nn.make_mesh(fsdp=jax.device_count())
    >>> print(mesh.axis_names)
    ('data', 'fsdp', 'context', 'tensor')

    ```

    Args:
        data: the size of the axis "data", as are the next three of theirs.
        devices: None for all, those of other processes too.

    Raises:
        ValueError: a size is not a positive integer, or their product is not the number
            of devices.

    References:
        fsdp: ZeRO, stage 3, https://arxiv.org/abs/1910.02054; tensor: Megatron-LM,
        https://arxiv.org/abs/1909.08053.
    """
    op = "make_mesh"
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    sizes = {name: check_integer(op, name, size) for name, size in sizes.items()}
    count = jax.device_count() if devices is None else len(devices)
    if math.prod(sizes.values()) != count:
        given = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"{op}: the product of the sizes must be the number of devices, {count}, "
            f"got {given} = {math.prod(sizes.values())}"
        )
    types = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


class MeshSizes(TypedDict, total=False):
    """The sizes of a mesh's axes, as `make_mesh` takes them."""

    data: int
    fsdp: int
    context: int
    tensor: int


def parse_mesh_sizes(text: str) -> MeshSizes:
    """The sizes for `make_mesh` from a command line, such as "fsdp=4,tensor=2".

    The axes may be in any order. Spaces around a name or a size do not count, and no
    text at all gives no sizes.

    ```python
    >>> from jaxkern import nn
    >>> print(nn.parse_mesh_sizes("fsdp=4,tensor=2"))
    {'fsdp': 4, 'tensor': 2}

    ```

    Raises:
        ValueError: a part is no `axis=size`, an axis is unknown or repeated, or a size
            is not a positive integer.
    """
    op = "parse_mesh_sizes"
    sizes: MeshSizes = {}
    for part in text.split(",") if text.strip() else ():
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise ValueError(
                f"{op}: axis must be one of {', '.join(AXES)}, got {name!r}"
            )
        if name in sizes:
            raise ValueError(f"{op}: {name} must be given once, got {text!r}")
        if not (size.isascii() and size.isdecimal()) or int(size) < 1:
            raise ValueError(
                f"{op}: {name} must be an integer of at least 1, got {size!r}"
            )
        sizes[name] = int(size)
    return sizes


def get_sharding(
    tree: Any, mesh: Mesh, rules: Sequence[tuple[str, str | None]] = SHARDING_RULES
) -> Any:
    """For each array of a module's state where it lies, by its logical axes.

    As `nnx.get_named_sharding` with `nnx.logical_axis_rules`, but checked. Of two axes
    of an array with one place the first has it, and a place that the mesh has no axis
    for splits nothing. Arrays without logical axes are whole on every device. An
    optimizer's state is made of states like the parameters', so it goes with them:

        graph, state = nnx.split(nnx.eval_shape(make_model))
        moments = jax.eval_shape(optimizer.init, state)
        places = nn.get_sharding((state, moments), mesh)

    Args:
        tree: of arrays or their `jax.ShapeDtypeStruct`s; nothing is computed.
        rules: the mesh axis, or None, of each logical axis.

    Raises:
        ValueError: a logical axis has no rule, or the size of an array's axis is not a
            multiple of that of its mesh axis.
    """
    with nnx.logical_axis_rules(()):
        named = nnx.get_partition_spec(tree)
    place = partial(_place, mesh=mesh, rules=dict(rules))
    return jax.tree.map_with_path(place, tree, named)


def _place(path, array, names: P, *, mesh: Mesh, rules) -> NamedSharding:
    op, axes = "get_sharding", []
    for size, name in zip(array.shape, (*names, *[None] * array.ndim), strict=False):
        if name is not None and name not in rules:
            known = ", ".join(rules)
            raise ValueError(f"{op}: an axis must be one of {known}, got {name!r}")
        axis = rules.get(name)
        if axis not in mesh.shape or axis in axes:
            axis = None
        if axis is not None and size % mesh.shape[axis]:
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{op}: {name!r} must be a multiple of {axis}={mesh.shape[axis]}, "
                f"got {size} of {where.removesuffix('.value')} {array.shape}"
            )
        axes.append(axis)
    return NamedSharding(mesh, P(*axes))


def check_mesh(
    op: str, mesh: Mesh, num_heads: int, num_kv_heads: int, attention_fn: object
) -> None:
    """It is as `make_mesh` makes it, and its devices can share heads and tokens."""
    if mesh.axis_names != AXES or {*mesh.axis_types} != {AxisType.Auto}:
        raise ValueError(
            f"{op}: mesh must have the automatic axes {', '.join(AXES)}, as "
            f"jaxkern.nn.make_mesh makes it, got {mesh}"
        )
    for name, heads in [("num_heads", num_heads), ("num_kv_heads", num_kv_heads)]:
        if heads % mesh.shape["tensor"]:
            raise ValueError(
                f"{op}: {name} must be a multiple of tensor={mesh.shape['tensor']}, "
                f"got {heads}"
            )
    if mesh.shape["context"] > 1 and attention_fn is not None:
        raise ValueError(
            f"{op}: attention_fn must be None for context={mesh.shape['context']}, "
            "where tokens go round in ring_attention, got one"
        )


def check_batch(op: str, mesh: Mesh, batch: int, seq: int) -> None:
    """The devices can share the tokens."""
    groups, rings = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if batch % groups:
        raise ValueError(
            f"{op}: batch must be a multiple of data x fsdp = {groups}, got {batch}"
        )
    if rings > 1 and seq % (2 * rings):
        raise ValueError(
            f"{op}: seq must be a multiple of 2 x context = {2 * rings}, got {seq}"
        )


def attend_on_mesh(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mesh: Mesh,
    mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """`attention` of each device's part; a kernel can run in it.

    With a "context" axis the tokens are in zigzag order, and keys and values go round.
    """
    spec = P(BATCH, "context", "tensor")
    attend: Any = partial(attention, is_causal=is_causal)
    arrays, specs = (query, key, value), (spec, spec, spec)
    if mask is not None:
        batch, heads, *_ = mask.shape
        arrays += (mask,)
        specs += (P(None if batch == 1 else BATCH, None if heads == 1 else "tensor"),)
    if mesh.shape["context"] > 1:
        if mask is not None:
            raise ValueError(
                f"TransformerLM: mask must be None for context={mesh.shape['context']},"
                f" where tokens go round in ring_attention, got {mask.shape}"
            )
        options: Any = {"axis_name": "context", "layout": "zigzag"}
        attend = partial(ring_attention, is_causal=is_causal, **options)

    def local(query, key, value, *mask):
        named = {"mask": mask[0]} if mask else {}
        return attend(query, key, value, **named)

    shared = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec)
    return shared(*arrays)
