"""Our own pytrees: they compare and hash by value, and `jax.export` serializes them."""

import json
from typing import Any

import jax
import numpy as np
from jax import export
from jax.core import Tracer


class ArrayTree:
    """A frozen dataclass of arrays and static fields that compares by value.

    A traced array has no value yet, and is equal only to itself. The shapes that
    `jax.eval_shape` puts in the place of arrays are equal by shape and dtype.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        ours, theirs = jax.tree.flatten(self), jax.tree.flatten(other)
        return ours[1] == theirs[1] and all(map(_same, ours[0], theirs[0]))

    def __hash__(self) -> int:
        # Equal trees have equal shapes, which need not be read from a device.
        leaves, tree = jax.tree.flatten(self)
        return hash((tree, *(getattr(x, "shape", None) for x in leaves)))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    arrays = all(isinstance(x, jax.Array | np.ndarray) for x in (a, b))
    if not arrays or any(isinstance(x, Tracer) for x in (a, b)):
        return not arrays and bool(a == b)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and np.array_equal(a, b)


def register[T: type](cls: T) -> T:
    """Make the dataclass a pytree that `jax.export` serializes.

    Its static fields must be numbers, strings, None and tuples of these.
    """
    export.register_pytree_node_serialization(
        jax.tree_util.register_dataclass(cls),
        serialized_name=f"jaxkern.{cls.__name__}",
        serialize_auxdata=lambda static: json.dumps(static, default=_refuse).encode(),
        deserialize_auxdata=lambda text: _as_tuples(json.loads(bytes(text))),
    )
    return cls


def _refuse(static: object) -> str:
    raise TypeError(
        "jax.export cannot serialize a mask that holds a Python function, got "
        f"{static}; BlockMask.from_dense and BlockMask.document hold arrays instead"
    )


def _as_tuples(static: Any) -> Any:
    """JSON has lists, which are not equal to the tuples that they were."""
    return tuple(map(_as_tuples, static)) if isinstance(static, list) else static
