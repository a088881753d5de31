"""`benchmarks.estimators --study`: bias and variance where the gradient is known.

L is a polynomial of six Bernoulli entries, so that the gradient of its mean for their
logits is a sum over 64 outcomes.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxkern

from ._report import (
    Results,
    make_console,
    metadata,
    number,
    print_header,
    print_table,
    save_figure,
    table,
)

ENTRIES, DRAWS = 6, 2**16
SCALES = (0.5, 1.0, 2.0, 4.0)
TEMPERATURES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
# Further than that from 0 is no accident of the draws.
ERRORS = 4
Loss = Callable[[jax.Array], jax.Array]
Gradient = Callable[[Loss, jax.Array, jax.Array], jax.Array]
Row = dict[str, Any]


def losses(seed: int) -> dict[str, Loss]:
    """By the degree in each entry."""
    keys = jax.random.split(jax.random.key(seed), 3)
    c, w = (jax.random.normal(key, (ENTRIES,)) for key in keys[:2])
    a = jax.random.normal(keys[2], (ENTRIES, ENTRIES))
    return {
        "linear": lambda b: c @ b,
        "quadratic": lambda b: c @ b + b @ a @ b,
        "quartic": lambda b: (w @ b - 1) ** 4,
    }


def logits_at(scale: float) -> jax.Array:
    """Of both signs, the largest of that size."""
    return scale * jnp.linspace(-1, 1, ENTRIES)


def exact(loss: Loss, logits: jax.Array) -> np.ndarray:
    """Over all outcomes, in float64."""
    with jax.enable_x64(True):
        outcomes = np.indices((2,) * ENTRIES).reshape(ENTRIES, -1).T.astype(float)

        def mean(logits):
            p = jax.nn.sigmoid(logits)
            chance = jnp.where(outcomes > 0, p, 1 - p).prod(-1)
            return chance @ jax.vmap(loss)(jnp.asarray(outcomes))

        return np.asarray(jax.grad(mean)(jnp.asarray(np.asarray(logits, float))))


def by(estimator: Callable[..., jax.Array], drawn: bool = True) -> Gradient:
    def gradient(loss, logits, key):
        options = {"key": key} if drawn else {}
        return jax.grad(lambda x: loss(estimator(x, **options)))(logits)

    return gradient


def rloo(loss: Loss, logits: jax.Array, key: jax.Array, samples: int = 4) -> jax.Array:
    """The score, times the loss less the mean loss of the other draws.

    No estimator of ours: it needs no derivative of the loss, but several values of it,
    where those give one mask a derivative.
    """
    p = jax.nn.sigmoid(logits)
    b = jax.random.bernoulli(key, p, (samples, *logits.shape)).astype(p.dtype)
    values = jax.vmap(loss)(b)
    others = (values.sum() - values) / (samples - 1)
    return ((values - others) @ (b - p)) / samples


GRADIENTS: dict[str, Gradient] = {
    "seed_reinmax": by(
        partial(jaxkern.straight_through, derivative="one_plus_sigmoid"), drawn=False
    ),
    "straight_through": by(jaxkern.straight_through, drawn=False),
    "straight_through, drawn": by(jaxkern.straight_through),
    "straight_through, drawn, sigmoid": by(
        partial(jaxkern.straight_through, derivative="sigmoid")
    ),
    "reinmax": by(jaxkern.reinmax),
    "binary_concrete": by(jaxkern.binary_concrete),
    "rloo, 4 draws": rloo,
}
TEMPERED: dict[str, Callable[..., jax.Array]] = {
    "reinmax": jaxkern.reinmax,
    "binary_concrete": jaxkern.binary_concrete,
}


def measure(gradient: Gradient, loss: Loss, logits: jax.Array, seed: int) -> Row:
    """Bias and standard deviation over the size of the exact gradient; direction."""
    keys = jax.random.split(jax.random.key(seed + 1), DRAWS)
    run = jax.jit(jax.vmap(lambda key: gradient(loss, logits, key)))
    values = np.asarray(run(keys), np.float64)
    truth = exact(loss, logits)
    size = np.linalg.norm(truth)
    std = np.sqrt(values.var(axis=0, ddof=1).sum())
    mean = values.mean(axis=0)
    bias = np.linalg.norm(mean - truth)
    error = std / np.sqrt(DRAWS)
    return {
        "bias": bias / size,
        "std": std / size,
        "bias_error": error / size,
        "cosine": mean @ truth / np.linalg.norm(mean) / size,
        # The sum of float32 numbers is off by some of their last places.
        "unbiased": bool(bias <= ERRORS * error + 1e-5 * size),
    }


def study(seed: int) -> list[Row]:
    rows = []
    for degree, loss in losses(seed).items():
        for scale in SCALES:
            for name, gradient in GRADIENTS.items():
                labels = {"loss": degree, "logits": scale, "temperature": 1.0}
                row = measure(gradient, loss, logits_at(scale), seed)
                rows.append(labels | {"estimator": name} | row)
        for name, estimator in TEMPERED.items():
            for temperature in TEMPERATURES:
                if temperature == 1 or (name == "reinmax" and temperature < 1):
                    continue
                tempered = by(partial(estimator, temperature=temperature))
                row = measure(tempered, loss, logits_at(1.0), seed)
                labels = {"loss": degree, "logits": 1.0, "temperature": temperature}
                rows.append(labels | {"estimator": name} | row)
    return rows


def _percent(value: float, unbiased: bool = False) -> str:
    return "0" if unbiased or not value else number(100 * value, 2)


def print_study(console: Console, rows: list[Row]) -> None:
    names = list(losses(0))
    short = ("linear", "quadr.", "quart.")
    columns = [c for name in short for c in (name, "±", "cos")]
    found = {
        (r["estimator"], r["loss"], r["logits"], r["temperature"]): r for r in rows
    }

    def cells(estimator: str, scale: float, temperature: float) -> list[str]:
        texts = []
        for name in names:
            row = found[estimator, name, scale, temperature]
            texts += [_percent(row["bias"], row["unbiased"]), _percent(row["std"])]
            texts.append(f"{row['cosine']:.2f}")
        return texts

    title = "Bias ± std in % of the exact gradient's size, and cosine with it"
    result = table(title, ["", *columns])
    for scale in SCALES:
        result.add_row(f"[bold]logits to ±{scale:g}[/bold]")
        for name in GRADIENTS:
            shown = name.replace("straight_through, ", "  ")
            result.add_row(f" {shown}", *cells(name, scale, 1.0))
    print_table(console, result)
    result = table("The same by temperature, logits to ±1", ["", *columns])
    for name in TEMPERED:
        result.add_row(f"[bold]{name}[/bold]")
        for temperature in TEMPERATURES:
            if (name, names[0], 1.0, temperature) in found:
                result.add_row(f" {temperature:g}", *cells(name, 1.0, temperature))
    print_table(console, result)
    console.print("Bias 0: within what the draws can show. At temperature 1 that is,")
    for name in names:
        them = "; ".join(unbiased(rows, name))
        console.print(f"for L {name} in each entry:\n  {them}.")


def unbiased(rows: list[Row], loss: str) -> list[str]:
    """Those without a bias for any logits, at temperature 1."""
    chosen = [r for r in rows if r["loss"] == loss and r["temperature"] == 1]
    names = dict.fromkeys(r["estimator"] for r in chosen)
    return [
        name
        for name in names
        if all(r["unbiased"] for r in chosen if r["estimator"] == name)
    ]


COLOURS = dict(
    zip(
        GRADIENTS,
        ["#606060", "#8cc4e6", "#0072b2", "#2e8b57", "#c1272d", "#e69f00", "#7a3e9d"],
        strict=True,
    )
)
# Where the plot has 0, in percent.
ZERO = 0.3


def plot(rows: list[Row], path: Any, meta: Mapping[str, Any]) -> None:
    """Bias above and deviation below, over the logits' size; a column a loss."""
    # Only here: it is an optional package, and the tables do not need it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(losses(0))
    figure, axes = plt.subplots(
        2, len(names), figsize=(11, 6.8), sharex=True, sharey=True
    )
    for loss, column in zip(names, axes.T, strict=True):
        for estimator in GRADIENTS:
            group = [
                r
                for r in rows
                if (r["loss"], r["estimator"]) == (loss, estimator)
                and r["temperature"] == 1
            ]
            _draw(column, group, estimator)
        column[0].set_title(f"L {loss} in each entry", fontsize=10)
        column[1].set_xlabel("logits up to ± (log scale)")
    for axis, what in zip(axes[:, 0], ("bias", "standard deviation"), strict=True):
        axis.set_ylabel(f"{what}, % (log scale)")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_xticks(SCALES, [f"{s:g}" for s in SCALES])
        axis.set_yscale("log")
        # 0 has no place on a log scale.
        ticks = [1, 10, 100, 1000]
        axis.set_yticks([ZERO, *ticks], ["0", *(f"{t:g}" for t in ticks)])
        axis.minorticks_off()
        axis.grid(lw=0.4)
    handles = [
        axes[0, 0].plot([], [], "o-", **_style(name), label=name)[0]
        for name in GRADIENTS
    ]
    figure.legend(
        handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=9
    )
    text = f"{DRAWS} draws, seed {meta['seed']}, jaxkern {meta['revision']}"
    figure.text(0.995, 0.005, text, ha="right", va="bottom", fontsize=7)
    figure.tight_layout(rect=(0, 0.015, 1, 0.93))
    save_figure(figure, path)
    plt.close(figure)


def _style(estimator: str) -> dict[str, Any]:
    # Rings in rings, where several have none.
    size = 4 + 1.6 * (len(COLOURS) - 1 - list(COLOURS).index(estimator))
    return {"color": COLOURS[estimator], "ms": size, "mfc": "none", "lw": 1.4}


def _draw(column: Any, group: list[Row], estimator: str) -> None:
    for axis, what in zip(column, ("bias", "std"), strict=True):
        values = [
            ZERO if what == "bias" and row["unbiased"] else max(100 * row[what], ZERO)
            for row in group
        ]
        axis.plot([r["logits"] for r in group], values, "o-", **_style(estimator))


def main(args: argparse.Namespace) -> int:
    meta = metadata(
        "estimators",
        dtype="float32",
        matmul_precision="highest",
        seed=args.seed,
        timing_text="none",
        notes={"draws": f"{DRAWS} a row, of {ENTRIES} Bernoulli entries"},
    )
    console = make_console()
    print_header(console, "How far are the estimators' gradients from the exact?", meta)
    with jax.default_matmul_precision("highest"):
        rows = study(args.seed)
    print_study(console, rows)
    results = Results(args.json, meta)
    results.rows = rows
    saved = results.end(complete=True)
    if args.plot:
        plot(rows, args.plot, meta)
    return int(not saved)
