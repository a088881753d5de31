"""Train a language model on Python's own sources, byte by byte, and let it write.

python examples/train_lm.py                 about three minutes on two cores
python examples/train_lm.py --mlp 2:4       another MLP
python examples/train_lm.py --compare       loss and time of all MLPs
python examples/train_lm.py --text docs     the files of a folder, packed into rows
python examples/train_lm.py --init FOLDER --text docs --save tuned
                                            fine-tune a model of Hugging Face's form
python examples/train_lm.py --folder run    keep checkpoints, and a log in log.jsonl;
                                            the same command again resumes exactly

--mesh fsdp=4,tensor=2 splits the model and the batch over several devices, and
--mesh context=8 splits each sequence. On several machines, or for several processes,
run the same command for each with --distributed; SLURM and Open MPI tell it the rest:

srun python examples/train_lm.py --distributed --mesh fsdp=8,tensor=8 --folder run
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _checkpoints import Checkpoints
from _documents import Specs, Windows, make_specs, read_text
from _log import Progress, Record, is_first, say
from _optimizer import make_optimizer, make_schedule
from _options import parse
from _program import run_program, save_figure
from _tokenizers import Bytes, Tokenizer, read_tokenizer
from flax import nnx
from jax.experimental import multihost_utils

from jaxkern import models, nn

EVALUATIONS = 8
MLPS = {
    "swiglu": lambda embed_dim: None,
    "low-rank": lambda embed_dim: partial(nn.LowRankSwiGLU, rank=embed_dim // 4),
    "2:4": lambda embed_dim: partial(
        nn.LowRankReLU2, rank=embed_dim // 2, sparsity="2:4"
    ),
}


def make_model(
    args: argparse.Namespace, mesh: jax.sharding.Mesh, tokenizer: Tokenizer
) -> nn.TransformerLM:
    """Return a new model, or that of --init; its parameters are in float32."""
    dtypes: Any = {"dtype": args.dtype, "param_dtype": "float32"}
    if args.init is not None:
        length = args.context_length
        model = models.load(args.init, context_length=length, mesh=mesh, **dtypes)
        check_vocabulary(args, model.vocab_size, tokenizer)
        return model
    return nn.TransformerLM(
        vocab_size=tokenizer.vocab_size,
        context_length=args.context_length,
        embed_dim=args.embed_dim,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        hidden_dim=4 * args.embed_dim,
        mlp=MLPS[args.mlp](args.embed_dim),
        # --save writes a Llama.
        rope_pairs="halves",
        mesh=mesh,
        rngs=nnx.Rngs(args.seed),
        **dtypes,
    )


def check_vocabulary(args: argparse.Namespace, size: int, tokenizer: Tokenizer) -> None:
    """Refuse tokens that are not those of a loaded model."""
    if args.tokenizer is None and size != tokenizer.vocab_size:
        raise ValueError(
            f"--init must have a tokenizer.json for its {size} tokens, or give "
            f"--tokenizer, got {str(args.init)!r}"
        )
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"--tokenizer must have at most the {size} tokens of the model, got "
            f"{tokenizer.vocab_size}"
        )


class Programs(NamedTuple):
    """The model's graph, and the functions that start, step and evaluate a run.

    `shapes` is what `init` returns, without the numbers.
    """

    graph: Any
    shapes: Any
    init: Any
    step: Any
    loss: Any


def make_programs(
    args: argparse.Namespace,
    mesh: jax.sharding.Mesh,
    specs: Specs,
    tokenizer: Tokenizer,
) -> Programs:
    """Return the programs of a run on batches of the given specs.

    Nothing is computed yet, but a model is loaded, and sizes that do not fit the mesh
    are refused.
    """
    optimizer = make_optimizer(args)
    make = partial(make_model, args, mesh, tokenizer)
    graph, given = nnx.split(make() if args.init else nnx.eval_shape(make))

    def make_state(weights):
        return {"weights": weights, "moments": optimizer.init(weights)}

    shapes = jax.eval_shape(make_state, given)
    places = pure(nn.get_sharding(shapes, mesh))
    shapes = pure(shapes)

    def init():
        # A new model's weights are computed where they lie.
        def start(weights):
            weights = nnx.state(make()) if weights is None else weights
            return pure(make_state(weights))

        start = jax.jit(start, out_shardings=places, donate_argnums=0)
        return start(given if args.init else None)

    step, evaluate = make_step(graph, optimizer)
    jax.eval_shape(evaluate, shapes["weights"], dict(specs))
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    return Programs(graph, shapes, init, step, jax.jit(evaluate))


def make_step(graph: Any, optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
    """Return a function that updates a state, and one that returns a loss."""

    def loss(weights, part):
        tokens, ids = part["tokens"], part.get("segment_ids")
        model = nnx.merge(graph, weights)
        return model.loss(tokens[:, :-1], tokens[:, 1:], segment_ids=ids)

    def update(state, part_and_share):
        part, share = part_and_share

        def share_of_loss(weights):
            return share * loss(weights, part)

        weights, moments = state["weights"], state["moments"]
        value, gradients = jax.value_and_grad(share_of_loss)(weights)
        updates, moments = optimizer.update(gradients, moments, weights)
        weights = optax.apply_updates(weights, updates)
        return {"weights": weights, "moments": moments}, value

    def step(state, batch):
        state, losses = jax.lax.scan(update, state, (batch, get_shares(batch)))
        norm = optax.tree.get(state["moments"], "gradient_norm")
        return state, {"loss": losses.mean(), "gradient_norm": norm}

    def evaluate(weights, batch):
        return loss(weights, jax.tree.map(lambda parts: parts[0], batch))

    return step, evaluate


def get_shares(batch: Any) -> jax.Array:
    """Return the tokens of each part that count, over their mean.

    Without this, a token would weigh more in a part with many short documents.
    """
    ids = batch.get("segment_ids")
    if ids is None:
        return jnp.ones(len(batch["tokens"]))
    counts = (ids[..., 1:] == ids[..., :-1]).sum((1, 2))
    return counts / jnp.maximum(1, counts.mean())


@contextmanager
def reasons() -> Iterator[None]:
    """End the run with the reason that the library gives."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))


def read_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
    with reasons():
        sizes = args.mesh or f"data={jax.device_count()}"
        return nn.make_mesh(**nn.parse_mesh_sizes(sizes))


def read_data(
    args: argparse.Namespace, mesh: jax.sharding.Mesh, tokenizer: Tokenizer
) -> Any:
    """Return the batches: `Windows` of a text in memory, or a `DataSet` by grain."""
    if args.data is None:
        return Windows(read_text(args.text, tokenizer), args, mesh, tokenizer)
    from _datasets import DataSet

    return DataSet(args, mesh, tokenizer)


def pure(tree: Any) -> Any:
    """Convert the states of modules to plain dictionaries, which checkpoints hold."""

    def is_state(x: Any) -> bool:
        return isinstance(x, nnx.State)

    return jax.tree.map(
        lambda x: nnx.to_pure_dict(x) if is_state(x) else x, tree, is_leaf=is_state
    )


class Run(NamedTuple):
    """The results of one training."""

    name: str
    parameters: int
    losses: list[float]
    seconds: list[float]
    held_out: float


def train(args: argparse.Namespace) -> Run:
    mesh, tokenizer = read_mesh(args), read_tokenizer(args)
    data = read_data(args, mesh, tokenizer)
    with reasons():
        programs = make_programs(args, mesh, data.specs, tokenizer)
    with Checkpoints(args, data.identity) as checkpoints:
        return train_on(data, args, mesh, programs, checkpoints)


def train_on(
    data: Any,
    args: argparse.Namespace,
    mesh: jax.sharding.Mesh,
    programs: Programs,
    checkpoints: Checkpoints,
) -> Run:
    state, read, first = checkpoints.restore(programs.init())
    leaves = jax.tree.leaves(programs.shapes)
    size = sum(x.size * x.dtype.itemsize for x in leaves)
    checkpoints.check_room(first, size)
    size = sum(w.size for w in jax.tree.leaves(state["weights"]))
    say(f"{size} parameters, {data.description}")
    if read is not None:
        data.restore(read)
    state, losses, seconds = run_steps(data, args, state, first, programs, checkpoints)
    batches = data.held_out_batches(EVALUATIONS)
    found = np.mean([float(programs.loss(state["weights"], b)) for b in batches])
    unit = data.tokenizer.unit
    text, baseline = f"held-out loss {found:.3f} nats a {unit}", data.baseline()
    if baseline is not None:
        text += f"; knowing only the {unit}s' frequencies {baseline:.3f}"
    say(text)
    model = nnx.merge(programs.graph, state["weights"])
    write(args, model, mesh, data.tokenizer)
    if args.save is not None:
        save(args, model, data.tokenizer)
    if first and checkpoints.log is not None:
        losses = [record["loss"] for record in checkpoints.log.read()]
    return Run(args.mlp or str(args.init), size, losses, seconds, float(found))


def run_steps(
    data: Any,
    args: argparse.Namespace,
    state: Any,
    first: int,
    programs: Programs,
    checkpoints: Checkpoints,
) -> tuple[Any, list[float], list[float]]:
    """Train from step `first` on, and return the state, losses, and seconds until each.

    The first step comes after compilation.
    """
    rate = jax.jit(make_schedule(args))
    step = programs.step.lower(state, dict(data.specs)).compile()
    tokens = args.accumulate * args.batch * args.context_length
    losses, seconds, records = [], [], list[Record]()
    with Progress(args, first) as progress:
        for i in range(first, args.steps):
            start = time.perf_counter()
            state, found = step(state, data.batch(i))
            record = {"step": i + 1} | {k: float(v) for k, v in found.items()}
            time_taken = time.perf_counter() - start
            record["learning_rate"] = float(rate(i))
            record["tokens_per_second"] = tokens / time_taken
            losses.append(record["loss"])
            seconds.append(time_taken + (seconds[-1] if seconds else 0.0))
            records.append(record)
            progress.show(i + 1, records)
            if (i + 1) % args.every == 0 or i + 1 == args.steps:
                checkpoints.save(i + 1, state, data.state(), records)
                records.clear()
    return state, losses, seconds


def write(
    args: argparse.Namespace, model, mesh: jax.sharding.Mesh, tokenizer: Tokenizer
) -> None:
    """Print the text with which the model continues the prompt."""
    prompt = np.asarray(tokenizer.encode(args.prompt.encode()), np.int32)[None]
    if prompt.size and prompt[0, -1] == tokenizer.end:
        prompt = prompt[:, :-1]
    prompt = prompt[:, : args.context_length // 2]
    if not prompt.size:
        return say("the tokenizer knows no token of the prompt")
    prompt = jax.device_put(prompt, jax.NamedSharding(mesh, jax.P()))
    count = args.context_length - prompt.shape[1]
    options = {"temperature": 0.7, "top_p": 0.95, "key": jax.random.key(args.seed)}
    written = model.generate(prompt, max_new_tokens=count, **options)
    written = multihost_utils.process_allgather(written, tiled=True)
    say(tokenizer.decode(np.asarray(written[0]).tolist()))


def save(args: argparse.Namespace, model: nn.TransformerLM, tokenizer: Tokenizer):
    """Write the model and its tokenizer, which `models.load` and transformers read."""
    if jax.process_count() > 1:
        graph, weights = nnx.split(model)
        weights = multihost_utils.process_allgather(weights, tiled=True)
        model = nnx.merge(graph, jax.tree.map(jnp.asarray, weights))
    if is_first():
        with reasons():
            models.save(model, args.save, like=args.init)
            tokenizer.save(args.save)
        say(f"saved in {args.save}")


def compare(args: argparse.Namespace) -> list[Run]:
    """Train with each MLP on the same batches, and print a table."""
    each = [argparse.Namespace(**vars(args) | {"mlp": name}) for name in MLPS]
    # Without this, the last MLP would be refused after the first ones have trained.
    for one in each:
        mesh = read_mesh(one)
        with reasons():
            make_programs(one, mesh, make_specs(one, mesh, packed=False), Bytes())
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
    args = parse(argv, __doc__, MLPS)
    if args.distributed:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    runs = compare(args) if args.compare else [train(args)]
    if args.plot and is_first():
        plot(runs, args.plot)


if __name__ == "__main__":
    run_program(main)
