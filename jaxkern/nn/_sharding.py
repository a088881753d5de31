"""Where a model's parameters and computations lie on a mesh of devices."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, TypedDict

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .._attention.decoder import decoder_attention
from .._attention.ring import ring_attention
from .._core.checks import check_integer, kind_of

# Neighbouring devices are along the last axis, so the axes are in the order of how much
# they communicate, the least first.
AXES = ("data", "fsdp", "context", "tensor")
# The axes that split the batch.
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
"""The mesh axis of each logical axis of a parameter, for `get_sharding`.

None splits nothing. A later rule for the same axis replaces an earlier one:
`(*SHARDING_RULES, ("vocab", None))` keeps the vocabulary whole.
"""


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    r"""Make a mesh with the axes "data", "fsdp", "context" and "tensor".

    $$\mathrm{data} \cdot \mathrm{fsdp} \cdot \mathrm{context} \cdot \mathrm{tensor} =
    \text{number of devices}$$

    The batch is split over "data" and "fsdp", parameters over "fsdp" and "tensor" (see
    `SHARDING_RULES`), and the tokens of a sequence over "context". The axes are
    automatic (`jax.sharding.AxisType.Auto`).

    Args:
        data: The size of the axis "data", which splits the batch only.
        fsdp: The size of the axis "fsdp", which splits the batch and the parameters.
        context: The size of the axis "context", which splits sequences.
        tensor: The size of the axis "tensor", which splits heads, hidden features and
            the vocabulary.
        devices: The devices; None for all, also those of other processes.

    Returns:
        The mesh.

    Raises:
        ValueError: A size is not a positive integer, or the product of the sizes is not
            the number of devices.

    Examples:
        ```python
        import jax
        from jaxkern import nn

        mesh = nn.make_mesh(fsdp=jax.device_count())
        print(mesh.axis_names)
        ```
        ```text
        ('data', 'fsdp', 'context', 'tensor')
        ```

    References:
        fsdp: ZeRO, stage 3, https://arxiv.org/abs/1910.02054.
        tensor: Megatron-LM, https://arxiv.org/abs/1909.08053.
        context: Ring Attention, https://arxiv.org/abs/2310.01889.
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
    """Read the sizes for `make_mesh` from a text such as "fsdp=4,tensor=2".

    It is for the options of command lines. The axes may be in any order. Spaces around
    a name or a size do not count, and an empty text gives no sizes.

    Args:
        text: Comma-separated pairs `axis=size`.

    Returns:
        The sizes, for `make_mesh(**sizes)`.

    Raises:
        ValueError: A part is not `axis=size`, an axis is unknown or repeated, or a size
            is not a positive integer.

    Examples:
        ```python
        from jaxkern import nn

        print(nn.parse_mesh_sizes("fsdp=4,tensor=2"))
        ```
        ```text
        {'fsdp': 4, 'tensor': 2}
        ```
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
    """Return the sharding of each array of a tree, by its logical axes.

    It does what `nnx.get_named_sharding` does with `nnx.logical_axis_rules`, but checks
    the sizes. If two axes of an array have the same mesh axis, only the first is split.
    A rule with an axis that the mesh lacks splits nothing, and arrays without logical
    axes are whole on every device. An optimizer's state consists of states like the
    parameters', so `get_sharding((state, moments), mesh)` places both, where `moments =
    jax.eval_shape(optimizer.init, state)`.

    Args:
        tree: A tree of arrays or `jax.ShapeDtypeStruct`, such as the state of a module.
            Nothing is computed.
        mesh: The mesh, as from `make_mesh`.
        rules: Pairs of a logical axis and its mesh axis, or None for no split.

    Returns:
        A tree of the same structure with a `jax.sharding.NamedSharding` for each array.

    Raises:
        ValueError: A logical axis has no rule, or the size of an array's axis is not a
            multiple of the size of its mesh axis.

    Examples:
        ```python
        import jax
        from flax import nnx
        from jaxkern import nn

        mesh = nn.make_mesh(fsdp=jax.device_count())
        graph, state = nnx.split(nn.SwiGLU(8, 16, rngs=nnx.Rngs(0)))
        state = jax.device_put(state, nn.get_sharding(state, mesh))
        model = nnx.merge(graph, state)
        print(tuple(model.w_up[...].sharding.spec))
        ```
        ```text
        ('fsdp', 'tensor')
        ```

    References:
        The shardings of parameters: ZeRO, stage 3, https://arxiv.org/abs/1910.02054,
            and Megatron-LM, https://arxiv.org/abs/1909.08053.
    """
    with nnx.logical_axis_rules(()):
        named = nnx.get_partition_spec(tree)
    place = partial(_place, mesh=mesh, rules=dict(rules))
    return jax.tree.map_with_path(place, tree, named)


def _place(path, array, names: P, *, mesh: Mesh, rules) -> NamedSharding:
    """Return the sharding of one array."""
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
    """Check that the mesh is one of `make_mesh`, and that it splits heads evenly."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{op}: mesh must be a jax.sharding.Mesh, got {kind_of(mesh)}")
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
    """Check that the devices can share the tokens evenly."""
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
    **options: Any,
) -> jax.Array:
    """Attend on each device to its part, so that a kernel can run in it.

    With a "context" axis the tokens are in zigzag order, and keys and values go round
    the devices in `ring_attention`. The options are those of `decoder_attention`.
    """
    spec = P(BATCH, "context", "tensor")
    attend: Any = partial(decoder_attention, is_causal=is_causal, **options)
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
        options |= {"axis_name": "context", "layout": "zigzag"}
        attend = partial(ring_attention, is_causal=is_causal, **options)

    def local(query, key, value, *mask):
        named = {"mask": mask[0]} if mask else {}
        return attend(query, key, value, **named)

    shared = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec)
    return shared(*arrays)
