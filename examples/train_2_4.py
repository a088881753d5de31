"""Train a ReLU² MLP whose activations are 2:4-sparse, with each of its gradients.

    python examples/train_2_4.py                  a minute on two cores
    python examples/train_2_4.py --plot loss.png

The model predicts a character from the 16 before it, with embeddings, one residual
low-rank ReLU² MLP and a linear head. The text is Python's own standard library. The
model is trained from the same weights and on the same batches without sparsity, and
2:4-sparse with three gradients: the exact one, the straight-through one, and the one
of arXiv 2503.16672, which makes gradients of weights 2:4 too ("feature_wise").
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from _characters import (
    CONTEXT,
    FEATURES,
    CharacterModel,
    draw_windows,
    loss_fn,
    read_text,
    train_step,
)
from _program import add_plot, check_plot, run_program, save_figure
from flax import nnx

import jaxkern
from jaxkern.nn import LowRankReLU2

HIDDEN, RANK = 2064, 128
BATCH, STEPS, RATE = 512, 400, 2e-3
# The points of the curve, and the last training loss, are means of so many steps.
SMOOTH = 20
MLPS = {
    "dense": LowRankReLU2,
    "2:4 exact": partial(LowRankReLU2, sparsity="2:4", gradient="exact"),
    "2:4 straight-through": partial(
        LowRankReLU2, sparsity="2:4", gradient="straight_through"
    ),
    "2:4 feature-wise": partial(LowRankReLU2, sparsity="2:4", gradient="feature_wise"),
}
EMULATED = "2:4 is emulated on this device: it costs time here and saves none"


def zeros(model: CharacterModel, context: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the share of zeros in the activations before and after the selection."""
    assert isinstance(model.mlp, LowRankReLU2)
    h = model.norm(model.hidden(context))
    a = jax.nn.relu(jaxkern.low_rank_matmul(h, model.mlp.up.weight)) ** 2
    return (a == 0).mean(), (jaxkern.sparsify_2_4(a) == 0).mean()


class Run(NamedTuple):
    """The results of one training; `zeros` are before and after the selection."""

    losses: list[float]
    seconds: list[float]
    held_out: float
    zeros: tuple[float, float]


def train(codes: np.ndarray, test: jax.Array, steps: int) -> dict[str, Run]:
    """Train all models, step by step in turn, so that their times can be compared."""
    models = {
        name: CharacterModel(
            partial(mlp, FEATURES, HIDDEN, rank=RANK), rngs=nnx.Rngs(0)
        )
        for name, mlp in MLPS.items()
    }
    rate = optax.adamw(optax.cosine_decay_schedule(RATE, steps))
    pairs = {m: (x, nnx.Optimizer(x, rate, wrt=nnx.Param)) for m, x in models.items()}
    losses, seconds = ({name: [] for name in MLPS} for _ in range(2))
    random = np.random.default_rng(0)
    for step in range(steps):
        windows = draw_windows(codes, random, BATCH)
        for name, pair in pairs.items():
            if step == 0:  # compiled before the clock starts
                train_step(*nnx.clone(pair), windows)
            start = time.perf_counter()
            losses[name].append(float(train_step(*pair, windows)))
            seconds[name].append(time.perf_counter() - start)
    runs = {}
    for name, model in models.items():
        before, after = nnx.jit(zeros)(model, test[:, :CONTEXT])
        held_out = float(nnx.jit(loss_fn)(model, test))
        times = np.cumsum(seconds[name]).tolist()
        runs[name] = Run(losses[name], times, held_out, (float(before), float(after)))
    return runs


def report(runs: dict[str, Run]) -> None:
    columns = "loss", "held-out", "seconds", "zeros", "after 2:4"
    print(f"{'':<20}" + "".join(f"{name:>11}" for name in columns))
    for name, run in runs.items():
        loss, (before, after) = np.mean(run.losses[-SMOOTH:]), run.zeros
        selected = "-" if name == "dense" else f"{100 * after:.1f} %"
        print(
            f"{name:<20}{loss:11.3f}{run.held_out:11.3f}{run.seconds[-1]:11.1f}"
            f"{100 * before:9.1f} %{selected:>11}"
        )
    print(f"\n{EMULATED}")


def plot(runs: dict[str, Run], path: Path) -> None:
    """Draw the loss against time; each point is the mean of some steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        width = min(SMOOTH, len(run.losses))
        smooth = np.convolve(run.losses, np.ones(width) / width, mode="valid")
        (line,) = axes.plot(run.seconds[width - 1 :], smooth, lw=1.2, label=name)
        end = run.seconds[-1], smooth[-1]
        axes.plot(*end, "o", ms=5, color=line.get_color(), zorder=3)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"training loss, nats a character, mean of {SMOOTH} steps")
    axes.set_title(EMULATED, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_plot(parser, "the loss against time")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    check_plot(parser, args.plot)
    return args


def main(argv: list[str] | None = None) -> dict[str, Run]:
    args = parse(argv)
    codes, test = read_text()
    device = jax.devices()[0].device_kind
    print(f"{len(codes)} characters, {args.steps} steps each, {device}", flush=True)
    runs = train(codes, test, args.steps)
    report(runs)
    if args.plot:
        plot(runs, args.plot)
    return runs


if __name__ == "__main__":
    run_program(main)
