"""How our modules check their arguments and start their parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from .._core.checks import check_floating, check_integer
from .._core.dispatch import Implementation, check_implementation
from .._core.precision import widen

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


def check_input(module: str, x: jax.Array, features: int) -> jax.Array:
    (x,) = check_floating(module, x=x)
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(
            f"{module}: x must have shape (..., {features}), got {x.shape}"
        )
    return x


def check_means(
    op: str, module: object, kind: type[nnx.Module], wanted: str, name: str = "module"
) -> None:
    """`module` is a `kind`, and its call is that of one.

    Subclasses may mean something else, as `nnx.LoRALinear` is an `nnx.Linear` that adds
    a product to that of its kernel.
    """
    call: Any = kind.__call__
    if not isinstance(module, kind) or type(module).__call__ is not call:
        other = ", whose call is another" if isinstance(module, kind) else ""
        got = type(module).__name__
        raise TypeError(f"{op}: {name} must be {wanted}, got {got}{other}")


def relative_loss(
    w: Float[Array, "*shape"], approximation: Float[Array, "*shape"]
) -> float:
    r"""$\|W - A\|_F / \|W\|_F$, 0 where $W$ is; no square over- or underflows."""
    w, approximation = widen(w), widen(approximation)
    largest = jnp.abs(w).max()
    largest = jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(w / largest)
    lost = jnp.linalg.norm((w - approximation) / largest)
    return float(lost / jnp.where(norm > 0, norm, 1))


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
