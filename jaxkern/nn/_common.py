"""How our modules check their arguments and start their parameters."""

from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype, Initializer

from .._core.checks import check_floating, check_integer
from .._core.dispatch import Implementation, check_implementation

# Of each factor's fan-in: the product of two factors then has the variance of a
# full-rank kernel with the same initializer.
default_kernel_init = nnx.initializers.lecun_normal()
default_attention_kernel_init = nnx.initializers.xavier_normal()


def check_arguments(
    module: str, implementation: Implementation | None, **sizes: int
) -> None:
    """The implementation is one there is, and every size a positive integer."""
    check_implementation(module, implementation)
    for name, size in sizes.items():
        check_integer(module, name, size)


def check_callable(module: str, name: str, function: object) -> None:
    if not callable(function):
        kind = type(function).__name__
        raise TypeError(f"{module}: {name} must be callable, got {kind}")


def check_input(module: str, x: jax.Array, features: int) -> None:
    check_floating(module, x=x)
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(
            f"{module}: x must have shape (..., {features}), got {x.shape}"
        )


def make_kernel(
    init: Initializer,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    dtype: Dtype,
    axis_names: tuple[str | None, ...],
) -> nnx.Param[jax.Array]:
    # The names are for the user's own mesh and rules, so building a module needs none.
    return nnx.Param(
        init(rngs.params(), shape, dtype),
        out_sharding=axis_names,
        eager_sharding=False,
    )


def axis_metadata(*axis_names: str | None) -> dict[str, Any]:
    """The annotation that `make_kernel` makes, for parameters of flax's own layers."""
    return {"out_sharding": axis_names, "eager_sharding": False}


def scale_init(init: Initializer, gain: float) -> Initializer:
    """`init` times `gain`."""
    return lambda *args, **kwargs: gain * init(*args, **kwargs)
