"""Which tensors hold which parameters, and in which form."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ._families import OUTER, Family

# Names, and numbers where layers are in a list.
Path = tuple[Any, ...]
Shapes = Mapping[Path, tuple[int, ...]]


class Part(NamedTuple):
    """A parameter of a layer, which is a tensor or some of its rows.

    Attributes:
        path: The path of the parameter in the state of the model.
        layer: The layer, if the parameters of all layers are stacked; None otherwise.
        shape: The shape of the parameter, of one layer.
    """

    path: Path
    layer: int | None
    shape: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of the tensor, or of the part of it."""
        inputs = self._inputs
        if inputs is None:
            return self.shape
        if not inputs:
            return (math.prod(self.shape),)
        return math.prod(self.shape[inputs:]), math.prod(self.shape[:inputs])

    @property
    def _inputs(self) -> int | None:
        """The number of axes that a product sums over; None for the embedding."""
        if self.path[-1] == "embedding":
            return None
        if self.path[-2:] == ("out", "kernel"):
            return 2
        is_matrix = self.path[-1] in ("kernel", "w_gate", "w_up", "w_down", "head")
        return 1 if is_matrix else 0

    def from_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the parameter of a tensor, which has its outputs first."""
        return (rows.T if self._inputs else rows).reshape(self.shape)

    def to_rows(self, parameter: np.ndarray) -> np.ndarray:
        """Return the tensor of a parameter."""
        if not self._inputs:
            return parameter.reshape(self.rows)
        return parameter.reshape(self.rows[::-1]).T


class Tensor(NamedTuple):
    """A tensor of a file, with the parameters that it holds one behind the other."""

    name: str
    parts: list[Part]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        first, *rest = (part.rows for part in self.parts)
        return (first[0] + sum(rows[0] for rows in rest), *first[1:])

    def split(self, tensor: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
        """Yield the parameters of the tensor."""
        start = 0
        for part in self.parts:
            end = start + part.rows[0]
            yield part, part.from_rows(tensor[start:end])
            start = end

    def join(self, values: Mapping[Path, np.ndarray]) -> np.ndarray:
        """Return the tensor of the parameters of its layer."""
        rows = [part.to_rows(values[part.path]) for part in self.parts]
        return np.ascontiguousarray(rows[0] if len(rows) == 1 else np.concatenate(rows))


def flat_state(state: Any) -> dict[Path, Any]:
    """Return the variables of a state by their paths."""
    found: Any = nnx.to_flat_state(state)
    return dict(found)


def values_of(variables: Mapping[Path, Any]) -> dict[Path, Any]:
    """Return the value of each variable."""
    return {path: variable.get_value() for path, variable in variables.items()}


def shapes_of(variables: Mapping[Path, Any]) -> dict[Path, tuple[int, ...]]:
    """Return the shape of each variable."""
    return {path: x.shape for path, x in values_of(variables).items()}


def tensors_of(
    family: Family, shapes: Shapes, num_layers: int
) -> tuple[list[list[Tensor]], list[Path]]:
    """Return the tensors of a model of this family.

    Returns:
        The tensors in groups: the embedding, those of each layer, and the others. Then
        the paths of parameters that the family does not have.
    """
    groups: list[dict[str, Tensor]] = [{} for _ in range(num_layers + 2)]
    left = dict.fromkeys(shapes)

    def add(group, name, path, index):
        shape = shapes[path] if index is None else shapes[path][1:]
        tensor = groups[group].setdefault(name, Tensor(name, []))
        tensor.parts.append(Part(path, index, shape))
        left.pop(path, None)

    for ours, name in OUTER.items():
        path = tuple(ours.split("."))
        if path in shapes:
            add(0 if ours == "embedding" else -1, name, path, None)
    for i in range(num_layers):
        for ours, name in family.layer.items():
            rest = tuple(ours.split("."))
            for path, index in [(("layers", *rest), i), (("layers", i, *rest), None)]:
                if path in shapes:
                    add(i + 1, f"model.layers.{i}.{name}", path, index)
    return [list(group.values()) for group in groups], list(left)
