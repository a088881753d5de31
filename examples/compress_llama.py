"""Compress the MLPs of a language model by several methods, and fine-tune each result.

python examples/compress_llama.py                  trains a small Llama itself, first
python examples/compress_llama.py --plot loss.png  draws loss against parameters
python examples/compress_llama.py --folder DIR     a model of Hugging Face, or one that
                                                   jaxkern.models.save_native wrote

It prints the perplexity of held-out text, the parameters and the time of a token before
and after, and after fine-tuning, and the report of the best result, which --save DIR
keeps. The text is Python's standard library, or --text FILE. A folder needs its
tokenizer.json and the packages safetensors and tokenizers; without a folder, each
character is a token.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _characters import HELD_OUT, VOCAB, read_codes
from _program import add_plot, check_plot, run_program, save_figure
from flax import nnx

from jaxkern import nn
from jaxkern.compress import Report, compress

EMBED, HIDDEN, LAYERS, HEADS = 64, 192, 3, 4
# Sizes of the low-rank MLPs, as a share of the parameters of the given ones.
SHARES = 0.35, 0.6
# Each method, and whether it needs a size.
METHODS: dict[str, tuple[Any, bool]] = {
    "SVD": ("svd", True),
    "SVD-LLM": ("svd_llm", True),
    "2:4 magnitude": ("magnitude", False),
    "2:4 Wanda": ("wanda", False),
    "2:4 SparseGPT": ("sparsegpt", False),
    "SVD-LLM and 2:4": (("svd_llm", "sparsegpt"), True),
}
CALIBRATION = 64  # sequences
EVALUATIONS = 4  # batches


class Row(NamedTuple):
    """A compressed model, and its losses in nats a token."""

    name: str
    parameters: int
    before: float
    tuned: float
    us_a_token: float
    model: nn.TransformerLM
    report: Report | None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=400, help="of the training of a small Llama")
    add("--tuning-steps", type=int, default=50, help="of each fine-tuning")
    add("--context-length", type=int, default=64)
    add("--batch", type=int, default=16)
    add("--folder", type=Path, help="a trained model, instead of a small Llama")
    add("--text", type=Path, help="a file instead of the standard library")
    add("--save", type=Path, metavar="DIR", help="a folder for the best result")
    add_plot(parser, "loss against parameters")
    args = parser.parse_args(argv)
    for name in ("steps", "tuning_steps", "context_length", "batch"):
        if getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} must be at least 1, got {getattr(args, name)}")
    if args.folder is not None and not (args.folder / "tokenizer.json").is_file():
        parser.error(f"--folder must have a tokenizer.json, got {str(args.folder)!r}")
    if args.text is not None and not args.text.is_file():
        parser.error(f"--text must be a file to read, got {str(args.text)!r}")
    if args.save is not None and args.save.exists():
        parser.error(f"--save must be a new folder, got {str(args.save)!r}")
    check_plot(parser, args.plot)
    return args


def read_tokens(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens to train on, and held-out ones."""
    if args.text is None:
        train, held_out = read_codes()
    else:
        codes = np.frombuffer(args.text.read_bytes(), np.uint8)
        codes = codes[codes < VOCAB].astype(np.int32)
        train, held_out = codes[:-HELD_OUT], codes[-HELD_OUT:]
    if args.folder is not None:
        from tokenizers import Tokenizer

        encode = Tokenizer.from_file(str(args.folder / "tokenizer.json")).encode
        train, held_out = (
            np.array(encode(bytes(codes.tolist()).decode()).ids, np.int32)
            for codes in (train, held_out)
        )
    if min(len(train), len(held_out)) < args.context_length + 2:
        sys.exit(f"the text is too short: {len(train)} and {len(held_out)} tokens")
    return train, held_out


def draw(tokens: np.ndarray, args: argparse.Namespace, *seed: int) -> np.ndarray:
    """Return sequences that start at random places, one token longer than a context."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(tokens) - args.context_length, args.batch)
    return tokens[starts[:, None] + np.arange(args.context_length + 1)]


def load(folder: Path) -> nn.TransformerLM:
    import json

    from jaxkern import models

    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    return models.load_native(folder) if kind == "jaxkern" else models.load(folder)


def train(
    model: nn.TransformerLM, args: argparse.Namespace, tokens, steps: int, rate: float
) -> None:
    """Train the parameters in place; which of 2:4 weights are kept does not change."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))
    optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        gradients = nnx.grad(lambda m: m.loss(batch[:, :-1], batch[:, 1:]))(model)
        optimizer.update(model, gradients)

    for i in range(steps):
        step(model, optimizer, draw(tokens, args, 0, i))


def evaluate(
    model: nn.TransformerLM, args, held_out: np.ndarray
) -> tuple[float, float]:
    """Return the loss in nats a token, and the microseconds of a token."""
    loss = nnx.jit(lambda model, batch: model.loss(batch[:, :-1], batch[:, 1:]))
    losses, seconds = [], []
    for i in range(EVALUATIONS + 1):
        batch = draw(held_out, args, 1, max(i, 1))
        start = time.perf_counter()
        losses.append(float(loss(model, batch)))
        seconds.append(time.perf_counter() - start)
    tokens = args.batch * args.context_length
    # The first batch, which compiles, comes again.
    return float(np.mean(losses[1:])), 1e6 * float(np.median(seconds[1:])) / tokens


def sizes_of(model: nn.TransformerLM) -> tuple[int, int]:
    """Return the number of all parameters, and of those of the MLPs."""

    def count(module):
        return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))

    layers = model.layers
    several = isinstance(layers, nnx.List)
    mlps = [layer.mlp for layer in layers] if several else [layers.mlp]
    return count(model), sum(map(count, mlps))


def study(model: nn.TransformerLM, args, tokens, held_out) -> list[Row]:
    """Compress by each method and size, fine-tune, and print a line for each."""
    full, mlps = sizes_of(model)
    batches = range(-(-CALIBRATION // args.batch))
    calibration = np.concatenate([draw(tokens, args, 2, i) for i in batches])
    calibration = jnp.asarray(calibration[:CALIBRATION, :-1])
    before, us = evaluate(model, args, held_out)
    rows = [Row("given", full, before, before, us, model, None)]
    print(f"{'':<18}parameters  perplexity  fine-tuned  us a token")
    show(rows[0])
    for name, (method, sized) in METHODS.items():
        for share in SHARES if sized else [None]:
            target = None
            if share is not None:
                share = share / 2 if isinstance(method, tuple) else share
                target = full - mlps + math.ceil(share * mlps)
            new, report = compress(
                model,
                method=method,
                target_parameters=target,
                calibration=calibration,
            )
            loss, us = evaluate(new, args, held_out)
            train(new, args, tokens, args.tuning_steps, 1e-3)
            tuned, _ = evaluate(new, args, held_out)
            rows.append(Row(name, report.parameters, loss, tuned, us, new, report))
            show(rows[-1])
    return rows


def show(row: Row) -> None:
    before, tuned = (f"{math.exp(min(x, 99)):.3f}" for x in (row.before, row.tuned))
    tuned = "-" if row.report is None else tuned
    line = f"{row.name:<18}{row.parameters:>10}{before:>12}{tuned:>12}"
    print(f"{line}{row.us_a_token:>12.2f}", flush=True)


def plot(rows: list[Row], path: Path) -> None:
    """Draw the loss against the parameters, one line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    given, *rows = rows
    for axes, title in zip(panels, ("compressed", "and fine-tuned"), strict=True):
        for name in METHODS:
            some = sorted((r for r in rows if r.name == name), key=lambda r: r[1])
            losses = [r.before if title == "compressed" else r.tuned for r in some]
            axes.plot([r.parameters for r in some], losses, "o-", label=name)
        axes.axhline(given.before, color="gray", linestyle=":", label="given")
        axes.set_title(title)
        axes.set_xlabel(f"parameters, of {given.parameters}")
        axes.set_ylabel("held-out loss, nats a token")
        axes.grid(alpha=0.3)
    panels[1].legend()
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = parse(argv)
    tokens, held_out = read_tokens(args)
    print(f"{len(tokens)} tokens, {jax.devices()[0].device_kind}", flush=True)
    if args.folder is not None:
        model = load(args.folder)
    else:
        make = partial(nn.TransformerLM, VOCAB, args.context_length, num_layers=LAYERS)
        model = make(
            embed_dim=EMBED, num_heads=HEADS, hidden_dim=HIDDEN, rngs=nnx.Rngs(0)
        )
        start = time.perf_counter()
        train(model, args, tokens, args.steps, 3e-3)
        print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    rows = study(model, args, tokens, held_out)
    best = min(rows[1:], key=lambda row: row.tuned)
    print(f"\nthe smallest loss after fine-tuning, {best.name}:\n{best.report}")
    if args.save is not None:
        from jaxkern import models

        models.save_native(best.model, args.save)
    if args.plot:
        plot(rows, args.plot)
    return rows


if __name__ == "__main__":
    run_program(main)
