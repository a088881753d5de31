"""The text that examples share, and the small model of `train_2_4.py`."""

import sysconfig
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxkern.nn import LowRankReLU2

CONTEXT, EMBED, VOCAB = 16, 32, 128
FEATURES = CONTEXT * EMBED
HELD_OUT = 20_000


def read_codes() -> tuple[np.ndarray, np.ndarray]:
    """Return ASCII codes to train on, and those of the end, which is held out.

    The text is the top-level modules of Python's standard library.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    text = b"".join(path.read_bytes() for path in files)[:2_000_000]
    codes = np.frombuffer(text, np.uint8)
    codes = codes[codes < VOCAB].astype(np.int32)
    return codes[:-HELD_OUT], codes[-HELD_OUT:]


def read_text() -> tuple[np.ndarray, jax.Array]:
    """Return codes to train on, and windows of the held-out end to test with."""
    codes, held_out = read_codes()
    return codes, windows_of(held_out, np.arange(0, HELD_OUT - CONTEXT, 5))


def windows_of(codes: np.ndarray, starts: np.ndarray) -> jax.Array:
    """Return windows, each of which is a context and the character after it."""
    return jnp.asarray(codes[starts[:, None] + np.arange(CONTEXT + 1)])


def draw_windows(
    codes: np.ndarray, random: np.random.Generator, count: int
) -> jax.Array:
    """Return windows that start at random places of the text."""
    return windows_of(codes, random.integers(0, len(codes) - CONTEXT, count))


class CharacterModel(nnx.Module):
    """Embeddings, one residual MLP and a linear head, which predict a character."""

    def __init__(self, make_mlp: Callable[..., LowRankReLU2], *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, EMBED, rngs=rngs)
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.mlp = make_mlp(rngs=rngs)
        self.head = nnx.Linear(FEATURES, VOCAB, rngs=rngs)

    def hidden(self, context: jax.Array) -> jax.Array:
        return self.embed(context).reshape(len(context), FEATURES)

    def __call__(self, context: jax.Array) -> jax.Array:
        h = self.hidden(context)
        return self.head(h + self.mlp(self.norm(h)))


def loss_fn(model: CharacterModel, windows: jax.Array) -> jax.Array:
    """Return the mean loss in nats a character."""
    logits, targets = model(windows[:, :CONTEXT]), windows[:, CONTEXT]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def train_step(
    model: CharacterModel, optimizer: nnx.Optimizer, windows: jax.Array
) -> jax.Array:
    """Update the model in place, and return the loss before the update."""
    loss, gradients = nnx.value_and_grad(loss_fn)(model, windows)
    optimizer.update(model, gradients)
    return loss
