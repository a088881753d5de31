"""Train a language model on Python's own sources, byte by byte, and let it write.

python examples/train_lm.py                 about three minutes on two cores
python examples/train_lm.py --mlp 2:4       another MLP
python examples/train_lm.py --compare       loss and time of all MLPs
python examples/train_lm.py --folder run    keep checkpoints, and losses in losses.csv;
                                            the same command again resumes exactly

--mesh fsdp=4,tensor=2 splits the model and the batch over several devices, and
--mesh context=8 splits each sequence. On several machines, or for several processes,
run the same command for each with --distributed; SLURM and Open MPI tell it the rest:

srun python examples/train_lm.py --distributed --mesh fsdp=8,tensor=8 --folder run
"""

import argparse
import importlib.util
import math
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from _checkpoints import Checkpoints, is_first, say
from _program import add_plot, check_plot, run_program, save_figure
from flax import nnx
from jax.experimental import multihost_utils

from jaxkern import nn

HELD_OUT = 0.05
EVALUATIONS = 8
MLPS = {
    "swiglu": lambda embed_dim: None,
    "low-rank": lambda embed_dim: partial(nn.LowRankSwiGLU, rank=embed_dim // 4),
    "2:4": lambda embed_dim: partial(
        nn.LowRankReLU2, rank=embed_dim // 2, sparsity="2:4"
    ),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=400)
    add("--context-length", type=int, default=128)
    add("--batch", type=int, default=16)
    add("--embed-dim", type=int, default=128)
    add("--num-layers", type=int, default=4)
    add("--num-heads", type=int, default=4)
    add("--mlp", choices=[*MLPS], default="swiglu")
    add("--compare", action="store_true", help="train one with each --mlp there is")
    add("--learning-rate", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--text", type=Path, help="a file instead of the standard library")
    add("--folder", type=Path, help="for checkpoints and losses")
    add("--every", type=int, default=50, help="steps from checkpoint to checkpoint")
    add_plot(parser, "the loss")
    help_mesh = "axes data, fsdp, context, tensor (default: data=all devices)"
    add("--mesh", metavar="AXIS=SIZE,...", help=help_mesh)
    add("--distributed", action="store_true", help="one of several processes")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 is, if not found")
    add("--processes", type=int, metavar="N", help="how many there are, if not found")
    add("--process", type=int, metavar="I", help="which this is, if not found")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse at once what would fail late."""
    for name in (
        "steps",
        "context_length",
        "batch",
        "embed_dim",
        "num_layers",
        "num_heads",
        "every",
    ):
        least = 2 if name == "context_length" else 1  # one half to write on from
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")
    if not 0 < args.learning_rate < math.inf:
        rate = args.learning_rate
        parser.error(f"--learning-rate must be positive and finite, got {rate}")
    found = args.coordinator, args.processes, args.process
    if not args.distributed and any(x is not None for x in found):
        parser.error("--coordinator, --processes and --process need --distributed")
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    processes = math.inf if args.processes is None else args.processes
    if args.process is not None and not 0 <= args.process < processes:
        parser.error(
            f"--process must be from 0 to one less than --processes, got {args.process}"
        )
    if args.compare and args.folder:
        parser.error("--compare must be without --folder: it keeps no checkpoints")
    text = args.text
    if text is not None and not (text.is_file() and os.access(text, os.R_OK)):
        parser.error(f"--text must be a file to read, got {str(args.text)!r}")
    check_plot(parser, args.plot)


def read_bytes(path: Path | None) -> np.ndarray:
    """Read a file, or all modules of the standard library one after another."""
    if path is not None:
        return np.frombuffer(path.read_bytes(), np.uint8)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"\n".join(m.read_bytes() for m in modules), np.uint8)


def split(text: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the text to train on, and its end, which is held out."""
    at = int(len(text) * (1 - HELD_OUT))
    train, held_out = text[:at], text[at:]
    if min(len(train), len(held_out)) < context + 1:
        sys.exit(
            f"the text must have at least {math.ceil((context + 1) / HELD_OUT)} bytes "
            f"for --context-length {context}, got {len(text)}"
        )
    return train, held_out


def make_batch(
    text: np.ndarray, args: argparse.Namespace, mesh: jax.sharding.Mesh, *at: int
) -> jax.Array:
    """Return the batch of a place `at` in the run, so that a run can resume anywhere.

    A process reads the rows of its own devices only.
    """
    rng = np.random.default_rng((args.seed, *at))
    starts = rng.integers(0, len(text) - args.context_length, args.batch)
    shape = args.batch, args.context_length + 1
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))

    def read(part: Any) -> np.ndarray:
        places = starts[part[0], None] + np.arange(shape[1])[part[1]]
        return text[places].astype(np.int32)

    return jax.make_array_from_callback(shape, rows, read)


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Return the loss of a model that knows only how often each byte occurs."""
    p = (np.bincount(train, minlength=256) + 1) / (len(train) + 256)
    return float(-np.log(p[held_out]).mean())


def make_model(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> nn.TransformerLM:
    return nn.TransformerLM(
        vocab_size=256,
        context_length=args.context_length,
        embed_dim=args.embed_dim,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        hidden_dim=4 * args.embed_dim,
        mlp=MLPS[args.mlp](args.embed_dim),
        mesh=mesh,
        rngs=nnx.Rngs(args.seed),
    )


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """Return AdamW with warm-up, cosine decay to a tenth, and clipped gradients."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        args.learning_rate,
        warmup_steps=max(1, args.steps // 20),
        decay_steps=max(2, args.steps),
        end_value=args.learning_rate / 10,
    )
    adam = optax.adamw(rate, b2=0.95, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def make_programs(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Any:
    """Return the model's graph, and the functions that start, step and evaluate a run.

    Nothing is computed yet, but sizes that do not fit the mesh are refused.
    """
    optimizer = make_optimizer(args)

    def make_state():
        weights = nnx.state(make_model(args, mesh))
        return {"weights": weights, "moments": optimizer.init(weights)}

    def init():
        return pure(make_state())

    graph = nnx.graphdef(nnx.eval_shape(partial(make_model, args, mesh)))
    places = pure(nn.get_sharding(jax.eval_shape(make_state), mesh))

    def loss(weights, batch):
        return nnx.merge(graph, weights).loss(batch[:, :-1], batch[:, 1:])

    def step(state, batch):
        weights, moments = state["weights"], state["moments"]
        value, gradients = jax.value_and_grad(loss)(weights, batch)
        updates, moments = optimizer.update(gradients, moments, weights)
        weights = optax.apply_updates(weights, updates)
        return {"weights": weights, "moments": moments}, value

    batch = jax.ShapeDtypeStruct((args.batch, args.context_length + 1), np.int32)
    jax.eval_shape(loss, jax.eval_shape(init)["weights"], batch)
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    return graph, jax.jit(init, out_shardings=places), step, jax.jit(loss)


def prepare(args: argparse.Namespace) -> tuple[jax.sharding.Mesh, Any]:
    """Return the mesh and the programs; an error ends the run with its reason."""
    try:
        sizes = args.mesh or f"data={jax.device_count()}"
        mesh = nn.make_mesh(**nn.parse_mesh_sizes(sizes))
        return mesh, make_programs(args, mesh)
    except ValueError as error:
        sys.exit(str(error))


def pure(tree: Any) -> Any:
    """Convert the states of modules to plain dictionaries, which checkpoints hold."""

    def is_state(x: Any) -> bool:
        return isinstance(x, nnx.State)

    return jax.tree.map(
        lambda x: nnx.to_pure_dict(x) if is_state(x) else x, tree, is_leaf=is_state
    )


class Progress:
    """A bar on a terminal, if rich is installed, or else a line for some steps.

    A bar hides the cursor in `with`, and shows it again however that ends.
    """

    def __init__(self, args: argparse.Namespace, first: int):
        self.args, self.bar = args, None
        if is_first() and sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich import progress

            texts = progress.TextColumn(
                "{task.completed}/{task.total} {task.fields[text]}"
            )
            columns = progress.BarColumn(), texts, progress.TimeRemainingColumn()
            self.bar = progress.Progress(*columns)
            self.task = self.bar.add_task(
                "", total=args.steps, completed=first, text=""
            )

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, step: int, losses: list[float], seconds: float) -> None:
        rate = len(losses) * self.args.batch * self.args.context_length / seconds
        text = f"loss {np.mean(losses):.3f}  {rate:.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif step % self.args.every == 0 or step == self.args.steps:
            say(f"step {step:>5}  {text}")


class Run(NamedTuple):
    """The results of one training."""

    name: str
    parameters: int
    losses: list[float]
    seconds: list[float]
    held_out: float


def train(args: argparse.Namespace) -> Run:
    text = read_bytes(args.text)
    split(text, args.context_length)
    mesh, programs = prepare(args)
    with Checkpoints(args, text) as checkpoints:
        return train_on(text, args, mesh, programs, checkpoints)


def train_on(
    text: np.ndarray,
    args: argparse.Namespace,
    mesh: jax.sharding.Mesh,
    programs: Any,
    checkpoints: Checkpoints,
) -> Run:
    train_text, held_out = split(text, args.context_length)
    graph, init, step, loss = programs
    shapes = jax.tree.leaves(jax.eval_shape(init))
    state, first = checkpoints.restore(init())
    size = sum(x.size * x.dtype.itemsize for x in shapes)
    checkpoints.check_room(first, size)
    size = sum(w.size for w in jax.tree.leaves(state["weights"]))
    say(f"{size} parameters, {len(train_text)} bytes to learn from")
    batch = partial(make_batch, train_text, args, mesh)
    step = step.lower(state, batch(first)).compile()
    losses, seconds, saved = [], [0.0], 0
    with Progress(args, first) as progress:
        for i in range(first, args.steps):
            start = time.perf_counter()
            state, value = step(state, batch(i))
            losses.append(float(value))
            seconds.append(seconds[-1] + time.perf_counter() - start)
            progress.show(i + 1, losses[saved:], seconds[-1] - seconds[saved])
            if (i + 1) % args.every == 0 or i + 1 == args.steps:
                checkpoints.save(i + 1, state, losses[saved:])
                saved = len(losses)
    batches = [make_batch(held_out, args, mesh, i, 1) for i in range(EVALUATIONS)]
    found = np.mean([float(loss(state["weights"], batch)) for batch in batches])
    unigram = unigram_loss(train_text, held_out)
    say(f"held-out loss {found:.3f} nats a byte", end="; ")
    say(f"knowing only the bytes' frequencies {unigram:.3f}")
    write(args, nnx.merge(graph, state["weights"]), mesh)
    if first:
        losses = [float(line) for line in checkpoints.losses.read_text().split()]
    return Run(args.mlp, size, losses, seconds[1:], float(found))


def write(args: argparse.Namespace, model, mesh: jax.sharding.Mesh) -> None:
    """Print the text with which the model continues `def `."""
    prompt = np.array([list(b"def ")], np.int32)[:, : args.context_length // 2]
    prompt = jax.device_put(prompt, jax.NamedSharding(mesh, jax.P()))
    count = args.context_length - prompt.shape[1]
    options = {"temperature": 0.7, "top_p": 0.95, "key": jax.random.key(args.seed)}
    written = model.generate(prompt, max_new_tokens=count, **options)
    written = multihost_utils.process_allgather(written, tiled=True)
    say(bytes(np.asarray(written[0]).tolist()).decode(errors="replace"))


def compare(args: argparse.Namespace) -> list[Run]:
    """Train with each MLP on the same batches, and print a table."""
    each = [argparse.Namespace(**vars(args) | {"mlp": name}) for name in MLPS]
    # Without this, the last MLP would be refused after the first ones have trained.
    for one in each:
        prepare(one)
    runs = []
    for one in each:
        say(f"\n{one.mlp}")
        runs.append(train(one))
    say("\nMLP        parameters  ms a step  seconds  held-out loss")
    for name, size, _, seconds, found in runs:
        ms = 1e3 * np.median(np.diff(seconds, prepend=0.0))
        say(f"{name:<9}{size:>12}{ms:>11.1f}{seconds[-1]:>9.1f}{found:>15.3f}")
    return runs


def plot(runs: list[Run], path: Path) -> None:
    """Draw the losses of several runs against time, or of one run against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        x = run.seconds if len(runs) > 1 else np.arange(1, len(run.losses) + 1)
        width = max(1, len(run.losses) // 20)
        # The mean of `width` steps is in front, and the losses of all steps behind it.
        smooth = np.convolve(run.losses, np.ones(width) / width, mode="valid")
        (line,) = axes.plot(x[width - 1 :], smooth, label=run.name)
        axes.plot(x, run.losses, color=line.get_color(), alpha=0.2, linewidth=0.7)
    axes.set_xlabel("seconds of training" if len(runs) > 1 else "steps")
    axes.set_ylabel("loss, nats a byte")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.distributed:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    runs = compare(args) if args.compare else [train(args)]
    if args.plot and is_first():
        plot(runs, args.plot)


if __name__ == "__main__":
    run_program(main)
