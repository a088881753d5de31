"""The weights of an MLP, taken out of its module and put into another one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
from flax import nnx
from flax.typing import Dtype

from .._core.activations import ActivationName
from .._core.checks import kind_of
from .._sparsity.packed import Packed24
from ..nn._common import axis_metadata, check_means
from ..nn._compressed_mlp import CompressedMLP, Linear
from ..nn._dense_mlp import MLP, SwiGLU
from ..nn._linear import LowRankLinear
from ..nn._low_rank_mlp import LowRankReLU2, LowRankSwiGLU
from ..nn._packed_mlp import Packed24Linear

Chain = tuple[jax.Array | Packed24, ...]
# The logical axes of each weight.
AXES = {"gate": ("embed", "mlp"), "up": ("embed", "mlp"), "down": ("mlp", "embed")}
KINDS = SwiGLU, MLP, LowRankSwiGLU, LowRankReLU2, CompressedMLP


@dataclass(frozen=True)
class Parts:
    """The weights of an MLP, and how it uses them.

    Attributes:
        weights: "gate", if there is one, "up" and "down", each with the factors whose
            product it is. A packed factor is transposed, as `Packed24Linear` takes it.
        biases: The biases by the same names.
        activation: As in `MLP`.
        sparsity: The sparsity of the activated layer.
        dtype: The dtype of the computation.
    """

    weights: Mapping[str, Chain]
    biases: dict[str, jax.Array]
    activation: ActivationName
    sparsity: Literal["2:4"] | None
    dtype: Dtype | None

    @property
    def is_packed(self) -> bool:
        """Whether some weight is 2:4-sparse."""
        chains = self.weights.values()
        return any(isinstance(factor, Packed24) for chain in chains for factor in chain)

    def flops(self) -> int:
        """Return the FLOPs of the matmuls for one token, 2 a multiply-add."""
        chains = self.weights.values()
        count = sum(2 * count_values(factor) for chain in chains for factor in chain)
        # Two of each four products with the activated layer are with zeros.
        skipped = count_values(self.weights["down"][0]) if self.sparsity else 0
        return count - skipped


def shape_of(factor: jax.Array | Packed24) -> tuple[int, int]:
    """Return the sizes of input and output of a factor."""
    if isinstance(factor, Packed24):
        return factor.features, factor.values.shape[0]
    return factor.shape[0], factor.shape[1]


def ranks_of(parts: Parts) -> dict[str, int]:
    """Return the rank of each weight that has two factors."""
    chains = parts.weights.items()
    return {name: shape_of(chain[0])[1] for name, chain in chains if len(chain) == 2}


def count_values(factor: jax.Array | Packed24) -> int:
    """Return how many values of a factor are stored."""
    return factor.values.size if isinstance(factor, Packed24) else factor.size


def take_apart(op: str, name: str, mlp: object) -> Parts:
    """Return the parts of an MLP, or refuse it by its name."""
    kind = next((kind for kind in KINDS if isinstance(mlp, kind)), SwiGLU)
    wanted = "one of " + ", ".join(kind.__name__ for kind in KINDS)
    check_means(op, mlp, kind, wanted, name)
    activation: ActivationName = "silu"
    weights: dict[str, Chain] = {}
    biases, sparsity = {}, None
    match mlp:
        case SwiGLU():
            chains = {"gate": mlp.w_gate, "up": mlp.w_up, "down": mlp.w_down}
            weights = {key: (w[...],) for key, w in chains.items()}
        case MLP():
            activation = mlp.activation
            chains = {"gate": mlp.w_gate, "up": mlp.w_up, "down": mlp.w_down}
            given = {"gate": mlp.b_gate, "up": mlp.b_up, "down": mlp.b_down}
            weights = {k: (w[...],) for k, w in chains.items() if w is not None}
            biases = {k: b[...] for k, b in given.items() if b is not None}
        case LowRankSwiGLU():
            layers = {"gate": mlp.gate, "up": mlp.up, "down": mlp.down}
            weights = {key: layer.weight for key, layer in layers.items()}
        case LowRankReLU2():
            activation, sparsity = "relu2", mlp.sparsity
            weights = {"up": mlp.up.weight, "down": mlp.down.weight}
        case CompressedMLP():
            activation, sparsity = mlp.activation, mlp.sparsity
            chains = {"gate": mlp.gate, "up": mlp.up, "down": mlp.down}
            weights = {k: _factors(chain) for k, chain in chains.items() if chain}
            biases = {key: bias[...] for key, bias in mlp.biases.items()}
        case _:
            raise AssertionError(kind_of(mlp))
    if sparsity not in (None, "2:4"):
        raise ValueError(
            f"{op}: {name} must have activations of sparsity None or '2:4', "
            f"got {sparsity!r}"
        )
    return Parts(weights, biases, activation, sparsity, mlp.dtype)


def _factors(chain: Any) -> Chain:
    factors = []
    for layer in chain:
        match layer:
            case nnx.Linear():
                factors.append(layer.kernel[...])
            case LowRankLinear():
                factors.extend(layer.weight)
            case _:
                factors.append(layer.weight)
    return tuple(factors)


def put_together(parts: Parts) -> nnx.Module:
    """Return a module of these parts, one with a kernel if there is one."""
    weights, plain = parts.weights, not parts.biases and not parts.is_packed
    if plain and all(len(chain) == 2 for chain in weights.values()):
        silu = parts.activation == "silu" and parts.sparsity is None
        if "gate" in weights and silu:
            return _low_rank(LowRankSwiGLU, parts)
        if "gate" not in weights and parts.activation == "relu2":
            return _low_rank(partial(LowRankReLU2, sparsity=parts.sparsity), parts)
    return as_plain(parts)


def as_plain(parts: Parts) -> CompressedMLP:
    """Return a `CompressedMLP` of these parts."""
    chains: dict[str, Any] = {name: _layers(parts, name) for name in parts.weights}
    return CompressedMLP(
        **chains,
        biases=parts.biases,
        activation=parts.activation,
        sparsity=parts.sparsity,
        dtype=parts.dtype,
    )


def _layers(parts: Parts, name: str) -> list[Linear]:
    """Return the layers of one weight."""
    chain, axes = parts.weights[name], AXES[name]
    if len(chain) == 2 and not parts.is_packed:
        return [_low_rank_linear(chain, axes, parts.dtype)]
    layers = []
    for i, factor in enumerate(chain):
        if isinstance(factor, Packed24):
            layers.append(Packed24Linear(factor, dtype=parts.dtype))
            continue
        names = axes[0] if i == 0 else None, axes[1] if i + 1 == len(chain) else None
        layer = nnx.Linear(
            *factor.shape,
            use_bias=False,
            dtype=parts.dtype,
            param_dtype=factor.dtype,
            kernel_init=lambda *_, kernel=factor: kernel,
            kernel_metadata=axis_metadata(*names),
            rngs=nnx.Rngs(0),
        )
        layers.append(layer)
    return layers


def _low_rank_linear(
    chain: Chain, axes: tuple[str, str], dtype: Dtype | None
) -> LowRankLinear:
    module = LowRankLinear(
        shape_of(chain[0])[0],
        shape_of(chain[1])[1],
        rank=shape_of(chain[0])[1],
        axis_names=(axes[0], "rank", axes[1]),
        **_zeros(chain, dtype),
    )
    _set_factors(module, chain)
    return module


def _low_rank(kind: Any, parts: Parts) -> nnx.Module:
    """Return a `LowRankSwiGLU` or a `LowRankReLU2`."""
    ranks = tuple(ranks_of(parts).values())
    up, down = parts.weights["up"], parts.weights["down"]
    module = kind(
        shape_of(up[0])[0],
        shape_of(down[0])[0],
        rank=ranks[0] if len({*ranks}) == 1 else ranks,
        **_zeros(up, parts.dtype),
    )
    for name, chain in parts.weights.items():
        _set_factors(getattr(module, name), chain)
    return module


def _zeros(chain: Chain, dtype: Dtype | None) -> dict[str, Any]:
    """Return the options of a module of zeros, in the dtype of a chain."""
    assert isinstance(chain[0], jax.Array)
    init = nnx.initializers.zeros_init()
    dtypes = {"dtype": dtype, "param_dtype": chain[0].dtype}
    return {**dtypes, "kernel_init": init, "rngs": nnx.Rngs(0)}


def _set_factors(module: LowRankLinear, chain: Chain) -> None:
    for param, factor in zip((module.w_in, module.w_out), chain, strict=True):
        assert isinstance(factor, jax.Array)
        param.set_value(factor)
