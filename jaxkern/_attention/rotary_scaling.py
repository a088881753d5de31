"""The scalings of rotary frequencies that stretch a trained context."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

from .._core.checks import (
    check_flag,
    check_integer,
    check_number,
    kind_of,
    raise_unknown,
)

ScalingKind = Literal["linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RotaryScaling:
    r"""A change of the rotary frequencies, for sequences longer than the trained ones.

    Frequency $\omega_i = \theta^{-2i/d}$ becomes $m_i\,\omega_i$, and sines and cosines
    are multiplied by the attention factor $t$. With $s$ the factor and $n$ the original
    context length:

    - "linear": $m_i = 1/s$. Position interpolation, as in Gemma 3.
    - "llama3": $m_i = 1/s$ where less than `low_frequency_factor` turns of
      $n\,\omega_i$ fit into the original context, 1 where more than
      `high_frequency_factor` do, and linear in the number of turns in between. Llama
      3.1, 3.2 and 3.3.
    - "yarn": $m_i = 1/s$ below `beta_slow` turns and 1 above `beta_fast`, and linear in
      $i$ in between; $t = 0.1 \log s + 1$. Qwen 2.5 and 3 with long contexts, gpt-oss.
    - "longrope": $m_i = 1/f_i$ with a list of `factors`;
      $t = \sqrt{1 + \log s / \log n}$. Phi-3, which has two lists: `long_factor` for
      sequences longer than $n$ and `short_factor` for others. A model keeps one of
      them, so that the keys in a cache stay valid while the sequence grows.

    Two values with equal arguments are equal and have one hash.

    Args:
        kind: The formula, see above.
        factor: The ratio $s$ of the new to the original context length.
        original_context_length: The context length $n$ of the training; every kind
            but "linear" needs it.
        low_frequency_factor: Turns in the original context up to which "llama3"
            interpolates.
        high_frequency_factor: Turns from which on "llama3" changes nothing.
        beta_fast: Turns from which on "yarn" changes nothing.
        beta_slow: Turns up to which "yarn" interpolates.
        truncate: Round the two limits of "yarn" to whole indices $i$, outwards. False
            for gpt-oss.
        factors: The list $f_i$ of "longrope", one number for each pair of features.
        attention_factor: The factor $t$; None for the value of the kind, which is 1 for
            "linear" and "llama3".

    Raises:
        TypeError: A number is not a number, or `factors` is not a sequence.
        ValueError: `kind` is unknown, a number is out of range, or a kind lacks an
            argument that it needs.

    Examples:
        ```python
        import jax.numpy as jnp
        import jaxkern

        x, positions = jnp.ones((1, 1, 1, 2)), jnp.array([6])
        scaling = jaxkern.RotaryScaling("linear", 2.0)
        halved = jaxkern.rotary_embedding(x, positions, scaling=scaling)
        assert jnp.allclose(halved, jaxkern.rotary_embedding(x, positions // 2))
        print(halved.shape)
        ```
        ```text
        (1, 1, 1, 2)
        ```

    References:
        "linear": https://arxiv.org/abs/2306.15595, eq. 4.
        "llama3": The Llama 3 models, section 3.4.2, https://arxiv.org/abs/2407.21783.
        "yarn": https://arxiv.org/abs/2309.00071, sections 3.2 and 3.4.
        "longrope": https://arxiv.org/abs/2402.13753.
    """

    kind: ScalingKind
    factor: float
    _: KW_ONLY
    original_context_length: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: Sequence[float] = ()
    attention_factor: float | None = None

    def __post_init__(self):
        op = "RotaryScaling"
        if self.kind not in get_args(ScalingKind):
            raise_unknown(op, "kind", self.kind, get_args(ScalingKind))
        names = "factor", "low_frequency_factor", "high_frequency_factor"
        for name in (*names, "beta_fast", "beta_slow"):
            check_number(op, name, getattr(self, name), positive=True)
        for low, high in [names[1:], ("beta_slow", "beta_fast")]:
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"{op}: {low} must be below {high}={getattr(self, high)}, "
                    f"got {getattr(self, low)}"
                )
        if self.attention_factor is not None:
            name = "attention_factor"
            check_number(op, name, self.attention_factor, positive=True)
        check_flag(op, truncate=self.truncate)
        if self.kind != "linear" or self.original_context_length is not None:
            name = "original_context_length"
            check_integer(op, name, self.original_context_length, least=2)
        if not isinstance(self.factors, Sequence) or isinstance(self.factors, str):
            kind = kind_of(self.factors)
            raise TypeError(f"{op}: factors must be a sequence, got {kind}")
        factors = tuple(self.factors)
        for i, factor in enumerate(factors):
            check_number(op, f"factors[{i}]", factor, positive=True)
        if bool(factors) != (self.kind == "longrope"):
            raise ValueError(
                f"{op}: factors must be given for 'longrope', and only there, "
                f"got {len(factors)} for {self.kind!r}"
            )
        object.__setattr__(self, "factors", factors)


def check_scaling(
    op: str, name: str, scaling: object, rope_theta: float, pairs: int
) -> None:
    """Check that the argument is a `RotaryScaling` for these frequencies."""
    if not isinstance(scaling, RotaryScaling):
        kind = kind_of(scaling)
        raise TypeError(f"{op}: {name} must be a RotaryScaling or None, got {kind}")
    if scaling.factors and len(scaling.factors) != pairs:
        raise ValueError(
            f"{op}: {name} must have {pairs} factors, one for each pair of features, "
            f"got {len(scaling.factors)}"
        )
    if scaling.kind == "yarn" and not rope_theta > 1:
        raise ValueError(
            f"{op}: rope_theta must be above 1 for a {name} of kind 'yarn', "
            f"got {rope_theta}"
        )


def multipliers(
    scaling: RotaryScaling | None, theta: float, pairs: int
) -> tuple[float, ...]:
    """Return the factor of each frequency."""
    if scaling is None:
        return (1.0,) * pairs
    if scaling.kind == "longrope":
        return tuple(1 / factor for factor in scaling.factors)
    shares = _interpolated(scaling, theta, pairs)
    return tuple(share / scaling.factor + (1 - share) for share in shares)


def _interpolated(scaling: RotaryScaling, theta: float, pairs: int) -> list[float]:
    """Return how far each frequency is interpolated: 0 is not at all, 1 is wholly."""
    length = scaling.original_context_length
    if length is None:
        return [1.0] * pairs
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = (length * theta ** (-i / pairs) / math.tau for i in range(pairs))
        return [_clip((high - count) / (high - low)) for count in turns]
    if scaling.kind == "linear":
        return [1.0] * pairs

    def index_of(turns: float) -> float:
        return pairs * math.log(length / (turns * math.tau)) / math.log(theta)

    first, last = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # These limits are those of the published code, also where they exceed `pairs`.
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = last - first or 0.001
    return [_clip((i - first) / width) for i in range(pairs)]


def _clip(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def attention_factor(scaling: RotaryScaling | None) -> float:
    """Return the factor of sines and cosines."""
    if scaling is None:
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    length = scaling.original_context_length
    if scaling.factor <= 1 or length is None:
        return 1.0
    match scaling.kind:
        case "yarn":
            return 0.1 * math.log(scaling.factor) + 1
        case "longrope":
            return math.sqrt(1 + math.log(scaling.factor) / math.log(length))
        case _:
            return 1.0
