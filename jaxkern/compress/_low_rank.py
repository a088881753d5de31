"""The ranks of low-rank weights, and their factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..nn._linear import project, right_singular_vectors

LowRankMethod = Literal["svd", "svd_llm"]


@jax.jit
def root_of(moment: Float[Array, "n n"]) -> Float[Array, "n n"]:
    r"""Return an $R$ with $R R^T$ equal to a second moment.

    It is the Cholesky factor. A moment of fewer tokens than features may have none in
    float32, and then it is made of the eigenvectors.
    """
    root = jnp.linalg.cholesky(moment)

    def from_eigenvectors():
        values, vectors = jnp.linalg.eigh(moment)
        return vectors * jnp.sqrt(jnp.maximum(values, 0))[None]

    return lax.cond(jnp.isfinite(root).all(), lambda: root, from_eigenvectors)


@partial(jax.jit, static_argnums=2)
def closest_factors(
    w: Float[Array, "d_in d_out"], root: Float[Array, "d_in d_in"] | None, rank: int
) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]:
    r"""Return the factors that minimize $\|R^T (W - W_{in} W_{out})\|_F$.

    With the root $R$ of the inputs' second moment this is the error of the outputs $X
    W$, as in SVD-LLM (https://arxiv.org/abs/2403.07378, section 3.2). Its factors
    $U_r \sqrt{S_r}$ and $\sqrt{S_r} V_r^T$ of $R^T W$, the first times $R^{-T}$, have
    the product $W V_r V_r^T$, which needs no inverse.
    """
    return project(w, right_singular_vectors(w, root)[1], rank)


def energies(
    w: Float[Array, "d_in d_out"], root: Float[Array, "d_in d_in"] | None
) -> np.ndarray:
    """Return the share of each singular value in the sum of their squares."""
    squares = np.square(np.asarray(_singular_values(w, root), np.float64))
    return squares / (squares.sum() or 1)


@jax.jit
def _singular_values(w: jax.Array, root: jax.Array | None) -> jax.Array:
    """Return them for a `w` whose largest entry is 1, so that squares are finite."""
    largest = jnp.abs(w).max()
    return right_singular_vectors(w / jnp.where(largest > 0, largest, 1), root)[0]


@dataclass(frozen=True)
class Tied:
    """Weights of an MLP that have one rank, since kernels take no others.

    Attributes:
        names: The names of the weights.
        shares: The sum of their `energies`.
        step: The ranks are multiples of it.
        cost: The parameters of `step` ranks.
        most: The largest rank with which the weights become smaller.
    """

    names: tuple[str, ...]
    shares: np.ndarray
    step: int
    cost: int
    most: int

    def by_energy(self, energy: float) -> int:
        """Return the smallest rank that keeps this share of each weight, or `most`.

        For two weights the share is their mean.
        """
        kept = np.cumsum(self.shares) / self.shares.sum()
        # Without this allowance, the rounding of the sum would keep all for energy=1.
        wanted = int(np.searchsorted(kept, energy - 1e-12)) + 1
        return min(-(-wanted // self.step) * self.step, self.most)

    def gains(self) -> np.ndarray:
        """Return what each further step of the rank keeps."""
        steps = self.most // self.step
        return self.shares[: steps * self.step].reshape(steps, self.step).sum(1)


def by_size(tied: Sequence[Tied], budget: int) -> list[int]:
    """Return the ranks of at most `budget` parameters that lose least.

    The loss is the sum of the lost shares. Each step of a rank keeps less than the one
    before it. So the best ranks come from the steps that keep most for each parameter,
    as in a fractional knapsack: nothing better exists if all steps cost the same, and
    otherwise up to the last step.
    """
    steps = [1] * len(tied)
    left = budget - sum(one.cost for one in tied)
    gains = [one.gains() for one in tied]
    order = [(-g / one.cost, i) for i, one in enumerate(tied) for g in gains[i][1:]]
    full = set()
    for _, i in sorted(order):
        if i in full:
            continue
        if tied[i].cost > left:
            full.add(i)
            continue
        steps[i] += 1
        left -= tied[i].cost
    return [one.step * n for one, n in zip(tied, steps, strict=True)]


def tie(
    weights: dict[str, jax.Array],
    roots: dict[str, jax.Array | None],
    names: tuple[str, ...],
    sparse: bool,
) -> Tied:
    """Return what is to know about the rank of some weights of an MLP."""
    d_in, d_out = weights[names[0]].shape
    step, cost = 1, d_in + d_out
    if sparse:
        step, cost = 4, 2 * (4 * -(-d_in // 4) + d_out)
    shares = sum(energies(weights[name], roots[name]) for name in names)
    most = (d_in * d_out - 1) // (d_in + d_out) // step * step
    return Tied(names, np.asarray(shares), step, cost * len(names), most)
