"""Train a language model on Python's own sources, byte by byte, and let it write.

python examples/train_lm.py                 about three minutes on two cores
python examples/train_lm.py --mlp 2:4       another MLP
python examples/train_lm.py --folder run    with checkpoints, a loss a line in
                                            losses.csv; again to go on, exactly
"""

import argparse
import json
import math
import os
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from jaxkern import nn

HELD_OUT = 0.05
EVALUATIONS = 8
MLPS = {
    "swiglu": lambda d_model: None,
    "low-rank": lambda d_model: partial(nn.LowRankSwiGLU, rank=d_model // 4),
    "2:4": lambda d_model: partial(nn.LowRankReLU2, rank=d_model // 2, sparsity="2:4"),
}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=400)
    add("--context", type=int, default=128)
    add("--batch", type=int, default=16)
    add("--d-model", type=int, default=128)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--mlp", choices=[*MLPS], default="swiglu")
    add("--learning-rate", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--text", type=Path, help="a file instead of the standard library")
    add("--folder", type=Path, help="for checkpoints and losses")
    add("--every", type=int, default=50, help="steps from checkpoint to checkpoint")
    args = parser.parse_args(argv)
    for name in ("steps", "context", "batch", "d_model", "layers", "heads", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text must be a file, got {str(args.text)!r}")
    return args


def read_bytes(path: Path | None) -> np.ndarray:
    """A file, or all modules of the standard library one after another."""
    if path is not None:
        return np.frombuffer(path.read_bytes(), np.uint8)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"\n".join(m.read_bytes() for m in modules), np.uint8)


def split(text: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """For training, and the end of the text, which it never sees."""
    at = int(len(text) * (1 - HELD_OUT))
    train, held_out = text[:at], text[at:]
    if min(len(train), len(held_out)) < context + 1:
        sys.exit(
            f"the text must have at least {math.ceil((context + 1) / HELD_OUT)} bytes "
            f"for --context {context}, got {len(text)}"
        )
    return train, held_out


def make_batch(text: np.ndarray, args: argparse.Namespace, *at: int) -> jax.Array:
    """The same for the same place in the run, so that one can go on anywhere."""
    rng = np.random.default_rng((args.seed, *at))
    starts = rng.integers(0, len(text) - args.context, args.batch)
    rows = text[starts[:, None] + np.arange(args.context + 1)]
    return jnp.asarray(rows.astype(np.int32))


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Of one who knows how often each byte occurs, and nothing else."""
    p = (np.bincount(train, minlength=256) + 1) / (len(train) + 256)
    return float(-np.log(p[held_out]).mean())


def make_model(args: argparse.Namespace) -> nn.TransformerLM:
    return nn.TransformerLM(
        vocab_size=256,
        context_length=args.context,
        d_model=args.d_model,
        num_layers=args.layers,
        num_heads=args.heads,
        d_ff=4 * args.d_model,
        mlp=MLPS[args.mlp](args.d_model),
        rngs=nnx.Rngs(args.seed),
    )


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay to a tenth, and clipped gradients."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        args.learning_rate,
        warmup_steps=max(1, args.steps // 20),
        decay_steps=max(2, args.steps),
        end_value=args.learning_rate / 10,
    )
    adam = optax.adamw(rate, b2=0.95, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


class Checkpoints:
    """In a folder, or nowhere; the settings of the run lie beside them."""

    def __init__(self, args: argparse.Namespace):
        self.manager = None
        if args.folder is None:
            return
        settings = {k: str(v) for k, v in sorted(vars(args).items()) if k != "folder"}
        folder, saved = args.folder.resolve(), args.folder / "settings.json"
        # Before an hour of training, not after it.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "losses.csv").touch()
        except OSError as error:
            sys.exit(f"--folder must be a folder to write to: {error}")
        if saved.exists() and (old := json.loads(saved.read_text())) != settings:
            changed = [k for k in settings if settings[k] != old.get(k)]
            text = ", ".join(f"{k} {old.get(k)}, now {settings[k]}" for k in changed)
            sys.exit(f"{args.folder} holds a run with other settings: {text}")
        saved.write_text(json.dumps(settings, indent=1) + "\n")
        self.losses = folder / "losses.csv"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=3, enable_async_checkpointing=False
        )
        self.manager = ocp.CheckpointManager(folder / "checkpoints", options=options)

    def restore(self, state):
        """The latest state that can be read and its step; at first the one given and 0.

        A checkpoint that cannot be read is moved aside, and if none can the run ends
        before anything is lost.
        """
        if self.manager is None:
            return state, 0
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        steps = sorted(self.manager.all_steps(), reverse=True)
        unreadable = []
        for step in steps:
            try:
                args = ocp.args.StandardRestore(shapes)
                state = self.manager.restore(step, args=args)
            # Whatever is wrong with the files, an older one may do.
            except Exception as error:
                first_line = (str(error).splitlines() or [""])[0]
                print(f"checkpoint {step} cannot be read: {first_line}")
                unreadable.append(step)
                continue
            self._move_aside(unreadable)
            self._keep_losses(step)
            print(f"going on from step {step}")
            return state, step
        if steps:
            sys.exit(f"no checkpoint in {self.manager.directory} can be read")
        self._keep_losses(0)
        return state, 0

    def _move_aside(self, steps: list[int]) -> None:
        """So that later ones can take their places."""
        if self.manager is None or not steps:
            return
        aside = self.losses.parent / "unreadable"
        aside.mkdir(exist_ok=True)
        for step in steps:
            target = aside / f"{step}-{time.time_ns()}"
            (self.losses.parent / "checkpoints" / str(step)).rename(target)
            print(f"moved to {target}")
        self.manager.reload()

    def _keep_losses(self, count: int) -> None:
        lines = self.losses.read_text().splitlines(keepends=True)[:count]
        self.losses.write_text("".join(lines))

    def save(self, step: int, state, losses: list[float]) -> None:
        if self.manager is None:
            return
        # The losses first: a kill in between leaves too many, which are dropped.
        with self.losses.open("a") as file:
            file.writelines(f"{loss!r}\n" for loss in losses)
            file.flush()
            os.fsync(file.fileno())
        self.manager.save(step, args=ocp.args.StandardSave(state))


def train(args: argparse.Namespace) -> None:
    train_text, held_out = split(read_bytes(args.text), args.context)
    model, optimizer = make_model(args), make_optimizer(args)
    graph, weights = nnx.split(model)
    weights = nnx.to_pure_dict(weights)

    def loss(weights, batch):
        return nnx.merge(graph, weights).loss(batch[:, :-1], batch[:, 1:])

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        weights, moments = state["weights"], state["moments"]
        value, gradients = jax.value_and_grad(loss)(weights, batch)
        updates, moments = optimizer.update(gradients, moments, weights)
        weights = optax.apply_updates(weights, updates)
        return {"weights": weights, "moments": moments}, value

    checkpoints = Checkpoints(args)
    state, first = checkpoints.restore(
        {"weights": weights, "moments": optimizer.init(weights)}
    )
    size = sum(w.size for w in jax.tree.leaves(weights))
    print(f"{size} parameters, {len(train_text)} bytes to learn from")
    losses, start = [], time.perf_counter()
    for i in range(first, args.steps):
        state, value = step(state, make_batch(train_text, args, i))
        losses.append(float(value))
        if (i + 1) % args.every == 0 or i + 1 == args.steps:
            seconds, start = time.perf_counter() - start, time.perf_counter()
            rate = len(losses) * args.batch * args.context / seconds
            print(
                f"step {i + 1:>5}  loss {np.mean(losses):.3f}  {rate:.0f} bytes/s",
                flush=True,
            )
            checkpoints.save(i + 1, state, losses)
            losses = []
    report(args, state["weights"], jax.jit(loss), train_text, held_out, model)


def report(args, weights, loss, train_text, held_out, model) -> None:
    batches = [make_batch(held_out, args, i, 1) for i in range(EVALUATIONS)]
    found = np.mean([float(loss(weights, batch)) for batch in batches])
    print(f"held-out loss {found:.3f} nats a byte", end="; ")
    print(
        f"knowing only the bytes' frequencies {unigram_loss(train_text, held_out):.3f}"
    )
    nnx.update(model, weights)
    prompt = jnp.asarray([list(b"def ")], jnp.int32)[:, : args.context // 2]
    count = args.context - prompt.shape[1]
    options = {"temperature": 0.7, "top_p": 0.95, "key": jax.random.key(args.seed)}
    written = model.generate(prompt, max_new_tokens=count, **options)
    print(bytes(np.asarray(written[0]).tolist()).decode(errors="replace"))


if __name__ == "__main__":
    train(parse())
