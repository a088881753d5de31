"""Train a ReLU² MLP whose activations are 2:4-sparse, with each gradient there is.

    python examples/train_2_4.py                  a minute on two cores
    python examples/train_2_4.py --plot loss.png

The text is Python's own standard library; the model predicts a character from the 16
before it: embeddings, one residual low-rank ReLU² MLP, a linear head. From the same
weights and on the same batches it is trained without sparsity, and 2:4-sparse with the
exact gradient, the straight-through one, and by the recipe of arXiv 2503.16672, which
makes gradients of weights 2:4 too ("feature_wise").
"""

import argparse
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _program import check_plot, run_program, save_figure
from flax import nnx

import jaxkern
from jaxkern.nn import LowRankReLU2

CONTEXT, EMBED, VOCAB = 16, 32, 128
FEATURES, HIDDEN, RANK = CONTEXT * EMBED, 2064, 128
BATCH, STEPS, RATE = 512, 400, 2e-3
HELD_OUT = 20_000
# Steps whose mean is a point of the curve, and the training loss at the end.
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


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """ASCII codes of the standard library's top-level modules: to train on, to test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    text = b"".join(path.read_bytes() for path in files)[:2_000_000]
    codes = np.frombuffer(text, np.uint8)
    codes = codes[codes < VOCAB].astype(np.int32)
    return codes[:-HELD_OUT], codes[-HELD_OUT:]


def windows_of(codes: np.ndarray, starts: np.ndarray) -> jax.Array:
    """Contexts and the character after each."""
    return jnp.asarray(codes[starts[:, None] + np.arange(CONTEXT + 1)])


class CharacterModel(nnx.Module):
    def __init__(self, mlp, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, EMBED, rngs=rngs)
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.mlp: LowRankReLU2 = mlp(FEATURES, HIDDEN, rank=RANK, rngs=rngs)
        self.head = nnx.Linear(FEATURES, VOCAB, rngs=rngs)

    def mlp_input(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = self.embed(context).reshape(len(context), FEATURES)
        return h, self.norm(h)

    def __call__(self, context: jax.Array) -> jax.Array:
        h, normalized = self.mlp_input(context)
        return self.head(h + self.mlp(normalized))

    def zeros(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Their share in the activations, before and after 2:4 selects."""
        _, normalized = self.mlp_input(context)
        a = jax.nn.relu(jaxkern.low_rank_matmul(normalized, self.mlp.up.weight)) ** 2
        return (a == 0).mean(), (jaxkern.sparsify_2_4(a) == 0).mean()


def loss_fn(model: CharacterModel, windows: jax.Array) -> jax.Array:
    """Nats a character."""
    logits, targets = model(windows[:, :CONTEXT]), windows[:, CONTEXT]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def train_step(
    model: CharacterModel, optimizer: nnx.Optimizer, windows: jax.Array
) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_fn)(model, windows)
    optimizer.update(model, gradients)
    return loss


class Run(NamedTuple):
    """What came of one."""

    losses: list[float]
    seconds: list[float]
    held_out: float
    zeros: tuple[float, float]


def train(codes: np.ndarray, test: jax.Array, steps: int) -> dict[str, Run]:
    """All of them, step by step in turn, so that the clock treats them alike."""
    models = {name: CharacterModel(mlp, rngs=nnx.Rngs(0)) for name, mlp in MLPS.items()}
    rate = optax.adamw(optax.cosine_decay_schedule(RATE, steps))
    pairs = {m: (x, nnx.Optimizer(x, rate, wrt=nnx.Param)) for m, x in models.items()}
    losses, seconds = ({name: [] for name in MLPS} for _ in range(2))
    random = np.random.default_rng(0)
    for step in range(steps):
        windows = windows_of(codes, random.integers(0, len(codes) - CONTEXT, BATCH))
        for name, pair in pairs.items():
            if step == 0:  # compiled before the clock starts
                train_step(*nnx.clone(pair), windows)
            start = time.perf_counter()
            losses[name].append(float(train_step(*pair, windows)))
            seconds[name].append(time.perf_counter() - start)
    runs = {}
    for name, model in models.items():
        before, after = nnx.jit(CharacterModel.zeros)(model, test[:, :CONTEXT])
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
    """Loss against time, the mean of some steps over all of them."""
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
    parser.add_argument("--plot", type=Path, metavar="FILE", help="loss against time")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    check_plot(parser, args.plot)
    return args


def main(argv: list[str] | None = None) -> dict[str, Run]:
    args = parse(argv)
    codes, held_out = read_text()
    test = windows_of(held_out, np.arange(0, HELD_OUT - CONTEXT, 5))
    device = jax.devices()[0].device_kind
    print(f"{len(codes)} characters, {args.steps} steps each, {device}", flush=True)
    runs = train(codes, test, args.steps)
    report(runs)
    if args.plot:
        plot(runs, args.plot)
    return runs


if __name__ == "__main__":
    run_program(main)
