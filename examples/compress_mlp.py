"""Compress a trained model: replace its SwiGLU by a low-rank one, and fine-tune.

    python examples/compress_mlp.py

The model predicts a character from the 16 before it, with embeddings, one residual
SwiGLU and a linear head. The text is Python's own standard library. The program prints
the losses before and after. It takes half a minute on two cores.
"""

import time
from functools import partial

import jax
import numpy as np
import optax
from _characters import (
    FEATURES,
    CharacterModel,
    draw_windows,
    loss_fn,
    read_text,
    train_step,
)
from _program import refuse_options, run_program
from flax import nnx

from jaxkern.nn import LowRankSwiGLU, SwiGLU

HIDDEN, RANK = 1376, 64
BATCH, STEPS, TUNING_STEPS = 512, 400, 150


def train(model: CharacterModel, codes: np.ndarray, steps: int, rate: float) -> float:
    """Train in place, and return the median time of a step in milliseconds."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    random = np.random.default_rng(0)
    times = []
    for _ in range(steps):
        windows = draw_windows(codes, random, BATCH)
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
    codes, test = read_text()
    print(f"{len(codes)} characters, {jax.devices()[0].device_kind}")
    print(
        f"{'':<28}{'MLP size':>11}{'test loss':>11}{'step ms':>9}{'test ms':>10}",
        flush=True,
    )

    model = CharacterModel(partial(SwiGLU, FEATURES, HIDDEN), rngs=nnx.Rngs(0))
    step_ms = train(model, codes, STEPS, rate=2e-3)
    report("SwiGLU", model, test, step_ms)

    assert isinstance(model.mlp, SwiGLU)
    model.mlp, errors = LowRankSwiGLU.from_full_rank(model.mlp, rank=RANK)
    report(f"rank {RANK} by SVD", model, test, None)

    step_ms = train(model, codes, TUNING_STEPS, rate=1e-3)
    report(f"rank {RANK}, fine-tuned", model, test, step_ms)
    lost = ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
    print(f"\nrelative error of the SVD: {lost}")


if __name__ == "__main__":
    refuse_options(__doc__)
    run_program(main)
