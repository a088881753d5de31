"""Train a character model, replace its SwiGLU by a low-rank one, fine-tune, compare.

    python examples/compress_mlp.py

The text is Python's own standard library; the model predicts a character from the 16
before it: embeddings, one residual SwiGLU, a linear head. Half a minute on two cores.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _program import run_program
from flax import nnx

from jaxkern.nn import LowRankSwiGLU, SwiGLU

CONTEXT, EMBED, VOCAB = 16, 32, 128
FEATURES, HIDDEN, RANK = CONTEXT * EMBED, 1376, 64
BATCH, STEPS, TUNING_STEPS = 512, 400, 150
HELD_OUT = 20_000


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """ASCII codes of the standard library's top-level modules: to train on, to test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    text = b"".join(path.read_bytes() for path in files)[:2_000_000]
    codes = np.frombuffer(text, np.uint8)
    codes = codes[codes < VOCAB].astype(np.int32)
    return codes[:-HELD_OUT], codes[-HELD_OUT:]


class CharacterModel(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, EMBED, rngs=rngs)
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.mlp: SwiGLU | LowRankSwiGLU = SwiGLU(FEATURES, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(FEATURES, VOCAB, rngs=rngs)

    def __call__(self, context: jax.Array) -> jax.Array:
        h = self.embed(context).reshape(len(context), FEATURES)
        return self.head(h + self.mlp(self.norm(h)))


def loss_fn(model: CharacterModel, windows: jax.Array) -> jax.Array:
    """Nats a character; a window is a context and the character after it."""
    logits = model(windows[:, :CONTEXT])
    targets = windows[:, CONTEXT]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def train_step(
    model: CharacterModel, optimizer: nnx.Optimizer, windows: jax.Array
) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_fn)(model, windows)
    optimizer.update(model, gradients)
    return loss


def windows_of(codes: np.ndarray, starts: np.ndarray) -> jax.Array:
    return jnp.asarray(codes[starts[:, None] + np.arange(CONTEXT + 1)])


def train(model: CharacterModel, codes: np.ndarray, steps: int, rate: float) -> float:
    """Train in place; returns the time of a step in milliseconds."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    random = np.random.default_rng(0)
    times = []
    for _ in range(steps):
        starts = random.integers(0, len(codes) - CONTEXT, BATCH)
        windows = windows_of(codes, starts)
        start = time.perf_counter()
        jax.block_until_ready(train_step(model, optimizer, windows))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def report(name: str, model: CharacterModel, test: jax.Array, step_ms: float | None):
    parameters = sum(p.size for p in jax.tree.leaves(nnx.state(model.mlp, nnx.Param)))
    evaluate = nnx.jit(loss_fn)
    loss = float(evaluate(model, test))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(evaluate(model, test))
        times.append(time.perf_counter() - start)
    step = f"{step_ms:9.1f}" if step_ms else f"{'-':>9}"
    test_ms = 1e3 * float(np.median(times))
    print(f"{name:<28}{parameters / 1e6:9.2f} M{loss:11.3f}{step}{test_ms:10.1f}")


def main() -> None:
    codes, held_out = read_text()
    starts = np.arange(0, HELD_OUT - CONTEXT, 5)
    test = windows_of(held_out, starts)
    print(f"{len(codes)} characters, {jax.devices()[0].device_kind}")
    print(
        f"{'':<28}{'MLP size':>11}{'test loss':>11}{'step ms':>9}{'test ms':>10}",
        flush=True,
    )

    model = CharacterModel(rngs=nnx.Rngs(0))
    step_ms = train(model, codes, STEPS, rate=2e-3)
    report("SwiGLU", model, test, step_ms)

    assert isinstance(model.mlp, SwiGLU)
    model.mlp, errors = LowRankSwiGLU.from_full_rank(model.mlp, RANK)
    report(f"rank {RANK} by SVD", model, test, None)

    step_ms = train(model, codes, TUNING_STEPS, rate=1e-3)
    report(f"rank {RANK}, fine-tuned", model, test, step_ms)
    lost = ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
    print(f"\nrelative error of the SVD: {lost}")


if __name__ == "__main__":
    # There are no options; but --help says what this is, and others are errors.
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    run_program(main)
