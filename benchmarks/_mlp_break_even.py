"""What 2:4 chosen per token gains over dense ReLU², by rank, width and tokens."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxkern._mlp.thresholds import FEATURE_STEP
from jaxkern._mosaic.base import round_up
from jaxkern._mosaic.matmul import choose_columns, limits_us

from . import _mlp_model as shapes
from ._harness import Row
from ._mlp_cost import sparse_work
from ._mlp_model import MODELS, Model
from ._mlp_report import by_model
from ._mlp_stages import (
    DENSE_WAYS,
    DOWN,
    DOWN_SPARSE,
    FIRST,
    LAST,
    UP_ACTIVATION,
    UP_SELECT,
    WAYS,
    predicted_us,
)
from ._mlp_stages_report import sum_of, times
from ._report import WIDTH, print_table, save_figure, table

TOKENS = (512, 2048, 8192, 32768)
# Of x and of the hidden layer; their ranks go up to where full rank is smaller.
WIDTHS = ("1B", "7B", "65B")
RANK_STEP = 64
# Of what is said in words.
EXAMPLE = "7B", 8192
NOTHING = "Nothing to draw: no stages of our kernels were measured."


@dataclass(frozen=True)
class Point:
    """Percent by which 2:4 is faster than dense, all stages of the MLP included."""

    model: str
    rank: int
    tokens: int
    percent: float


def ranks(model: Model) -> range:
    h, w = model.hidden, model.relu2
    return range(RANK_STEP, h * w // (h + w), RANK_STEP)


def _gain_percent(sum_of: Callable[[Sequence[str]], float | None]) -> float | None:
    """Over the fastest dense way of those that have a sum."""
    dense = [sum_of(way) for way in DENSE_WAYS]
    fastest = min((us for us in dense if us is not None), default=None)
    sparse = sum_of(WAYS["sparse"])
    if fastest is None or sparse is None:
        return None
    return 100 * (fastest / sparse - 1)


def _predicted_percent(model: Model, tokens: int) -> float:
    us = predicted_us(model, tokens)
    percent = _gain_percent(lambda way: sum(us[name] for name in way))
    assert percent is not None
    return percent


def predicted() -> list[Point]:
    points = []
    for label in WIDTHS:
        for tokens in TOKENS:
            for rank in ranks(MODELS[label]):
                model = replace(MODELS[label], rank=rank)
                percent = _predicted_percent(model, tokens)
                points.append(Point(label, rank, tokens, percent))
    return points


def measured(rows: Sequence[Row]) -> list[Point]:
    """Of the stages that were timed on this device; empty without kernels."""
    points = []
    for (label, _), group in by_model(rows).items():
        model, tokens = shapes.MODELS[label], group[0]["tokens"]
        percent = _gain_percent(partial(sum_of, times(group)))
        if percent is not None:
            points.append(Point(label, model.rank, tokens, percent))
    return points


def first_gain(points: Sequence[Point]) -> int | None:
    """The rank from which on there is a gain, at all larger ones too."""
    first = None
    for point in sorted(points, key=lambda p: -p.rank):
        if point.percent <= 0:
            break
        first = point.rank
    return first


def _select(points: Sequence[Point], label: str, tokens: int) -> list[Point]:
    return [p for p in points if (p.model, p.tokens) == (label, tokens)]


def print_predicted(console: Console, points: Sequence[Point]) -> None:
    """From which rank on there is a gain, the largest one, and what limits it."""
    title = "2:4 over the fastest dense ReLU²: predicted gain"
    columns = [text for label in WIDTHS for text in (f"{label}: rank", "most %")]
    result = table(title, ["tokens", *columns])
    for tokens in TOKENS:
        cells = []
        for label in WIDTHS:
            line = _select(points, label, tokens)
            first = first_gain(line)
            cells.append("none" if first is None else f"from {first}")
            # Below it a gain comes and goes with how tiles fill the chip.
            above = [p.percent for p in line if p.rank >= (first or 0)]
            cells.append(f"{max(above):.1f}")
        result.add_row(f" {tokens}", *cells)
    print_table(console, result)
    line = _select(points, *EXAMPLE)
    print(textwrap.fill(f"{_from_which(line)} {_limits(*EXAMPLE)}", WIDTH))


def _from_which(line: Sequence[Point]) -> str:
    first, best = first_gain(line), max(p.percent for p in line)
    at_all = min((p.rank for p in line if p.percent > 0), default=None)
    wins = "at no rank"
    if at_all is not None:
        wins = f"at rank {at_all} first, from {first or 'none'} on at every one"
    return (
        f"Predicted for {line[0].model}'s widths and {line[0].tokens} tokens: 2:4 wins "
        f"{wins}, by {best:.1f} % at most."
    )


def _limits(label: str, tokens: int) -> str:
    """What 2:4 costs and saves there, in words."""
    model = MODELS[label]
    us, w = predicted_us(model, tokens), round_up(model.relu2, FEATURE_STEP)
    work = sparse_work(tokens, w, model.rank)
    parts = limits_us(work, choose_columns(work))
    cause = max(parts, key=lambda name: parts[name])
    listed = ", ".join(f"{name} {us:.0f}" for name, us in parts.items())
    added, saved = us[UP_SELECT] - us[UP_ACTIVATION], us[DOWN] - us[DOWN_SPARSE]
    ends = 100 * (us[FIRST] + us[LAST]) / sum(us[name] for name in WAYS["sparse"])
    return (
        f"At its rank of {model.rank}, selecting adds {added:.0f} us to the "
        f"{us[UP_ACTIVATION]:.0f} us of the up matmul, and sparse tensor cores take "
        f"{saved:.0f} us off the {us[DOWN]:.0f} us of the down matmul, where {cause} "
        f"is the limit ({listed} us); {ends:.0f} % of the time are the first and the "
        "last factor, which stay dense."
    )


def plot(
    console: Console,
    path: Path,
    points: Sequence[Point],
    meta: Mapping[str, Any],
    *,
    is_measured: bool,
) -> None:
    """Gain against rank, a panel a width, a line a number of tokens."""
    if not points:
        console.print(NOTHING)
        return
    # Only here: it is an optional package, and the tables do not need it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = WIDTHS if not is_measured else ("",)
    figure, axes = plt.subplots(
        1, len(labels), figsize=(1 + 3.4 * len(labels), 4.2), squeeze=False, sharey=True
    )
    for label, axis in zip(labels, axes[0], strict=True):
        _draw(axis, [p for p in points if is_measured or p.model == label], is_measured)
        if label:
            model = MODELS[label]
            title = f"{label}: {model.hidden} x {model.relu2} features"
            axis.set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("2:4 per token faster than dense by, %")
    what = "measured" if is_measured else "PREDICTED for one H200, not measured"
    figure.suptitle(
        f"Low-rank ReLU² MLP, forward, selection and compression included: {what}",
        fontsize=11,
    )
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=5, frameon=False)
    text = f"jaxkern {meta['revision']}"
    if is_measured:
        text = f"{meta['device']}, {meta['dtype']}, {text}"
    figure.text(0.995, 0.01, text, ha="right", va="bottom", fontsize=7)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    save_figure(figure, path)
    plt.close(figure)


def _draw(axis: Any, points: Sequence[Point], is_measured: bool) -> None:
    tokens = sorted({p.tokens for p in points})
    for i, count in enumerate(tokens):
        line = sorted((p for p in points if p.tokens == count), key=lambda p: p.rank)
        xs, ys = [p.rank for p in line], [p.percent for p in line]
        mark = "o-" if is_measured else "-"
        axis.plot(xs, ys, mark, color=f"C{i}", lw=1.2, ms=4, label=f"{count} tokens")
    axis.axhline(0, color="black", lw=1)
    axis.set_xlabel("rank")
    axis.set_xlim(left=0)
    axis.grid(lw=0.4)
    axis.set_axisbelow(True)
