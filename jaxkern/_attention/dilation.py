"""The patterns of dilated attention, and the rows that each head takes."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from .._core.checks import check_flag, check_integer, kind_of, raise_unknown
from .tiles import pad_axis

HeadOffsets = Literal["paper", "blocks", "pattern"]
Uncovered = Literal["zero", "error"]


@dataclass(frozen=True)
class Dilation:
    r"""The patterns of dilated attention: segments of the sequence and strides in them.

    Pattern $i$ cuts the sequence into segments of $w_i$ tokens. In each segment, head
    $j$ takes the rows

    $$o, \quad o + r_i, \quad o + 2 r_i, \quad \dots$$

    where the offset $o$ follows from `head_offsets`. `dilated_attention`,
    `ring_attention` and `context_parallel_attention` take this value. Two values with
    equal arguments are equal and have one hash, so that they may be static arguments of
    `jax.jit`.

    Args:
        segment_lengths: The lengths $w_i$, in tokens.
        dilation_rates: The strides $r_i$, one for each segment length. A rate may
            exceed its segment, but not all may.
        head_offsets: "paper" stands for $o = j \bmod r_i$. "blocks" stands for
            $\lfloor j / \lceil H/r_i \rceil \rfloor$ of $H$ heads, so that consecutive
            heads have the same offset, as in torchscale. "pattern" stands for
            $i \bmod r_i$ in all heads.
        head_groups: Split the heads into consecutive groups, one for each pattern,
            instead of running every pattern in every head. If the heads do not divide,
            the first groups have one head more. With "pattern" this is the variant of
            DarcStar's fork of dilated-attention-pytorch, but for its final division by
            the number of patterns. It is not fkodom's original, which also divides by
            the sum of the outputs.
        stop_gradient_mix: Treat the shares $\alpha$ of the patterns as constants in the
            backward, as torchscale does.
        uncovered: What happens to a row that its head takes in no pattern: "zero" gives
            it the result 0 and the log-sum-exp $-\infty$, "error" raises. A rate of 1
            covers all rows.

    Raises:
        TypeError: Lengths or rates are not a sequence of integers, or a switch is
            neither True nor False.
        ValueError: Lengths and rates are not equally many positive integers, each rate
            exceeds its segment, or a name is unknown.

    Examples:
        ```python
        import jaxkern

        dilation = jaxkern.Dilation([2048, 8192], [1, 4])
        print(dilation.segment_lengths, dilation.dilation_rates)
        assert dilation == jaxkern.Dilation((2048, 8192), (1, 4))
        ```
        ```text
        (2048, 8192) (1, 4)
        ```

    References:
        LongNet, sections 2.2 and 2.3: https://arxiv.org/abs/2307.02486.
    """

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    _: KW_ONLY
    head_offsets: HeadOffsets = "paper"
    head_groups: bool = False
    stop_gradient_mix: bool = False
    uncovered: Uncovered = "zero"

    def __post_init__(self):
        op = "Dilation"
        lengths = _positive_integers(op, "segment_lengths", self.segment_lengths)
        rates = _positive_integers(op, "dilation_rates", self.dilation_rates)
        if len(lengths) != len(rates):
            raise ValueError(
                f"{op}: dilation_rates must be as many as the {len(lengths)} "
                f"segment_lengths, got {len(rates)}"
            )
        if all(r > w for w, r in zip(lengths, rates, strict=True)):
            raise ValueError(
                f"{op}: dilation_rates must not all exceed their segment_lengths "
                f"{lengths}, got {rates}"
            )
        for name, valid in [("head_offsets", HeadOffsets), ("uncovered", Uncovered)]:
            if getattr(self, name) not in get_args(valid):
                raise_unknown(op, name, getattr(self, name), get_args(valid))
        check_flag(
            op, head_groups=self.head_groups, stop_gradient_mix=self.stop_gradient_mix
        )
        # Tuples can be hashed, and the given sequences need not be tuples.
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)


def check_dilation(op: str, dilation: object) -> None:
    """Check that the argument is a `Dilation`."""
    if not isinstance(dilation, Dilation):
        raise TypeError(
            f"{op}: dilation must be a Dilation, such as "
            f"Dilation([2048, 8192], [1, 4]), got {kind_of(dilation)}"
        )


@dataclass(frozen=True)
class HeadStride:
    """The rows of one pattern that each head takes.

    Head j keeps every `rate`-th row, from the offset (first + step * j) // run % rate
    on. `group` heads that follow each other read the same vectors.
    """

    rate: int
    heads: int
    first: int = 0
    step: int = 1
    run: int = 1
    group: int = 1

    def of_heads(self, start: int, stop: int, every: int = 1) -> "HeadStride":
        """Return the stride of these heads alone."""
        return replace(
            self,
            heads=len(range(start, stop, every)),
            first=self.first + self.step * start,
            step=self.step * every,
        )

    def of_keys(self, kv_heads: int) -> "HeadStride":
        """Return the stride of the key heads.

        Where the query heads of a key head take different rows, the stride stays one of
        query heads, and its `group` says how many of them read one key head.
        """
        group = self.heads // kv_heads
        of_first = np.repeat(self.offsets[::group], group)
        if (self.offsets == of_first).all():
            return self.of_heads(0, self.heads, group)
        return replace(self, group=group)

    def index(self, head: Any) -> Any:
        """Return where a head's vector is among all (rate, vectors) of a row.

        Kernels call it with a traced head.
        """
        offset = lax.rem(lax.div(self.first + self.step * head, self.run), self.rate)
        return offset * (self.heads // self.group) + lax.div(head, self.group)

    @property
    def offsets(self) -> np.ndarray:
        """The first row that each head takes."""
        return (self.first + self.step * np.arange(self.heads)) // self.run % self.rate

    def take(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """Select each head's row: (..., rate, heads, ...) becomes (..., heads, ...)."""
        # A sum over one-hot rows fuses and leaves heads where they are on a mesh, which
        # a gather does not. Its transpose is `spread`.
        x = jnp.where(self._chosen(x, axis), x, jnp.zeros((), x.dtype))
        return x.any(axis) if x.dtype == bool else x.sum(axis, dtype=x.dtype)

    def spread(
        self, x: Float[Array, "..."], axis: int, fill: float
    ) -> Float[Array, "..."]:
        """Put rows back to where `take` found them, and `fill` into the others."""
        x = jnp.expand_dims(x, axis)
        return jnp.where(self._chosen(x, axis), x, jnp.asarray(fill, x.dtype))

    def _chosen(self, x: jax.Array, axis: int) -> Bool[np.ndarray, "rate heads *ones"]:
        chosen = np.arange(self.rate)[:, None] == self.offsets
        return chosen.reshape(*chosen.shape, *[1] * (x.ndim - axis - 2))


@dataclass(frozen=True)
class Pattern:
    """One pattern: in each segment, each head attends among the rows that it takes."""

    segment: int
    dilation: HeadStride

    @property
    def rows(self) -> int:
        """The number of rows of a segment that a head takes.

        The last of them may lie past its end.
        """
        return -(-self.segment // self.dilation.rate)

    def of_heads(self, start: int, stop: int, every: int = 1) -> "Pattern":
        """Return the pattern of these heads alone."""
        return replace(self, dilation=self.dilation.of_heads(start, stop, every))

    def divides(self, seq: int) -> bool:
        """Say whether the sequence, segments and rate divide without a rest."""
        return seq % self.segment == 0 and self.segment % self.dilation.rate == 0

    def split(
        self, x: Shaped[Array, "batch seq heads *features"]
    ) -> Shaped[Array, "batch segments rows rate heads *features"]:
        """Split tokens into the rows of each segment, with zeros past its end."""
        w, r = self.segment, self.dilation.rate
        batch, seq, *rest = x.shape
        x = pad_axis(x, 1, 0, -seq % w).reshape(batch, -(-seq // w), w, *rest)
        return pad_axis(x, 2, 0, -w % r).reshape(*x.shape[:2], self.rows, r, *rest)

    def select(
        self, x: Shaped[Array, "batch seq #heads *features"]
    ) -> Shaped[Array, "batch segments rows heads *features"]:
        """Select each head's rows of each segment, with zeros past its end."""
        return self.dilation.take(self.split(x), axis=3)

    def spread(
        self,
        x: Float[Array, "batch segments rows heads *features"],
        seq: int,
        fill: float,
    ) -> Float[Array, "batch seq heads *features"]:
        """Put rows back to where `select` found them, and `fill` into the others."""
        batch, segments, rows, *rest = x.shape
        x = self.dilation.spread(x, axis=3, fill=fill)
        x = x.reshape(batch, segments, rows * self.dilation.rate, *rest)
        x = x[:, :, : self.segment].reshape(batch, segments * self.segment, *rest)
        return x[:, :seq]


def make_patterns(dilation: Dilation, seq: int, heads: int) -> list[Pattern]:
    """Return the patterns of all heads; no segment is longer than the sequence."""
    lengths, rates, patterns = dilation.segment_lengths, dilation.dilation_rates, []
    for i, (w, r) in enumerate(zip(lengths, rates, strict=True)):
        # With rates this large a head takes at most one row of a segment, and a still
        # larger rate takes the same row.
        r = min(r, max(seq, heads, len(rates)))
        match dilation.head_offsets:
            case "paper":
                stride = HeadStride(r, heads)
            case "blocks":
                stride = HeadStride(r, heads, run=-(-heads // r))
            case "pattern":
                stride = HeadStride(r, heads, first=i % r, step=0)
        patterns.append(Pattern(min(w, seq), stride))
    return patterns


def _positive_integers(op: str, name: str, values: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(f"{op}: {name} must be a sequence of integers, got {values!r}")
    return tuple(check_integer(op, f"{name}[{i}]", x) for i, x in enumerate(values))


def split_heads(
    op: str, patterns: list[Pattern], heads: int, head_groups: bool
) -> list[tuple[tuple[int, int], list[Pattern]]]:
    """Return ranges of heads, each with the patterns that it runs."""
    if not head_groups:
        return [((0, heads), patterns)]
    count = len(patterns)
    if heads < count:
        raise ValueError(
            f"{op}: heads of query must be at least the {count} patterns for "
            f"head_groups, got {heads}"
        )
    size, larger = divmod(heads, count)
    starts = [i * size + min(i, larger) for i in range(count + 1)]
    ranges = zip(starts, starts[1:], strict=False)
    return [(heads_of, [p]) for heads_of, p in zip(ranges, patterns, strict=True)]


def check_covered(
    op: str, groups: Sequence[tuple[tuple[int, int], list[Pattern]]], seq: int
) -> None:
    """Check that each head takes every row in some pattern.

    Raises:
        ValueError: a head takes some row in no pattern.
    """
    for (start, stop), patterns in groups:
        if any(pattern.dilation.rate == 1 for pattern in patterns):
            continue
        covered = np.zeros((seq, stop - start), bool)
        for pattern in patterns:
            in_segment = np.arange(seq) % pattern.segment
            dilation = pattern.dilation.of_heads(start, stop)
            covered |= in_segment[:, None] % dilation.rate == dilation.offsets
        if not covered.all():
            row, head = np.argwhere(~covered)[0]
            raise ValueError(
                f"{op}: patterns must cover every row of every head for "
                f"uncovered='error', got row {row} of head {start + head} in none"
            )
