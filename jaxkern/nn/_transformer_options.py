"""The checks of the language model's options, and what follows from them."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from flax import nnx
from jax.sharding import Mesh

from .._attention.rotary import Pairs, check_rotary_dim
from .._attention.rotary_scaling import check_scaling
from .._core.activations import get_activation
from .._core.checks import check_integer, check_number, raise_unknown
from ._attention import QKNorm
from ._common import check_callable
from ._dense_mlp import MLP, SwiGLU
from ._norms import NormKind
from ._transformer_block import LayerKind, NormPlacement, linear_init


def check_numbers(op: str, **numbers: Any) -> None:
    """Check that each number is None or positive and finite."""
    for name, number in numbers.items():
        if number is not None:
            check_number(op, name, number, positive=True)


def check_names(norm, norm_placement, qk_norm, rope_pairs, activation) -> None:
    """Check that each name is known."""
    op = "TransformerLM"
    for name, got, valid in [
        ("norm", norm, get_args(NormKind)),
        ("norm_placement", norm_placement, get_args(NormPlacement)),
        ("qk_norm", qk_norm, (None, *get_args(QKNorm))),
        ("rope_pairs", rope_pairs, get_args(Pairs)),
    ]:
        if got not in valid:
            raise_unknown(op, name, got, valid)
    get_activation(op, activation)


def layer_kinds(
    kind: LayerKind, dim: int, local_rope_theta: float | None, every: int | None
) -> tuple[LayerKind, ...]:
    """Return the kinds of layers, in the order in which they repeat."""
    op = "TransformerLM"
    turned = dim
    if kind.rotary_dim is not None:
        turned = check_rotary_dim(op, kind.rotary_dim, dim)
    elif dim % 2:
        raise ValueError(
            f"{op}: embed_dim / num_heads or head_dim must be even, for rotary "
            f"positions, got {dim}"
        )
    if kind.scaling is not None:
        check_scaling(op, "rope_scaling", kind.scaling, kind.rope_theta, turned // 2)
    if kind.window is None:
        given = {"local_rope_theta": local_rope_theta, "full_attention_every": every}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{op}: {name} must be None without a window, got {value}"
                )
        return (kind,)
    local = kind._replace(window=check_integer(op, "window", kind.window))
    if every is None:
        if local_rope_theta is not None:
            raise ValueError(
                f"{op}: local_rope_theta must be None without full_attention_every, "
                f"where rope_theta is that of all layers, got {local_rope_theta}"
            )
        return (local,)
    every = check_integer(op, "full_attention_every", every, least=2)
    if local_rope_theta is not None:
        local = local._replace(rope_theta=local_rope_theta, scaling=None)
    return (*(local,) * (every - 1), kind._replace(window=None))


def check_capped(attention_fn: Any, mesh: Mesh | None, options: dict) -> None:
    """Check that a window or a softcap goes with the attention and the mesh."""
    op = "TransformerLM"
    for name, value in options.items():
        if value is None:
            continue
        if attention_fn is not None:
            raise ValueError(
                f"{op}: {name} must be None with an attention_fn, got {value}"
            )
        if mesh is not None and mesh.shape["context"] > 1:
            raise ValueError(
                f"{op}: {name} must be None for context={mesh.shape['context']}, where "
                f"tokens go round in ring_attention, got {value}"
            )


def choose_mlp(mlp, activation, gated, use_bias) -> Callable[..., nnx.Module]:
    """Return what makes the MLP of a block."""
    op = "TransformerLM"
    options = {"activation": activation, "gated": gated, "use_bias": use_bias}
    default = {"activation": "silu", "gated": True, "use_bias": False}
    if mlp is None:
        if options == default:
            return partial(SwiGLU, kernel_init=linear_init)
        return partial(MLP, kernel_init=linear_init, **options)
    check_callable(op, "mlp", mlp)
    if options != default:
        raise ValueError(
            f"{op}: activation, gated_mlp and mlp_bias must be left out with an mlp of "
            f"your own, got {activation!r}, {gated} and {use_bias}"
        )
    return mlp
