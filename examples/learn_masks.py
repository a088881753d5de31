"""Find the weights that each sample needs: learn a mask for it over a frozen model.

    python examples/learn_masks.py                    a minute on two cores
    python examples/learn_masks.py --plot frontier.png

A small transformer learns to copy: each sequence has random tokens, and then the same
tokens again. Then its weights are frozen, and each of 8 sequences learns a mask over
the first MLP. The loss is the KL divergence from the model without masks, and a price
for every weight that is on; the optimizer is Adam with a linear warm-up and clipped
gradients. For four estimators and each price, the program prints the share of weights
that are off and the KL divergence.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from _program import add_plot, check_plot, run_program, save_figure
from flax import nnx

import jaxkern
from jaxkern.nn import MaskLogits, QuadraticTransformer

VOCAB, HALF, EMBED, HEADS, LAYERS = 32, 12, 64, 4, 2
BATCH, SAMPLES = 32, 8
STEPS, MASK_STEPS = 900, 150
PRICES = (1.0, 10.0, 100.0)
ESTIMATORS: dict[str, Callable[..., jax.Array]] = {
    "straight_through": jaxkern.straight_through,
    "one_plus_sigmoid": partial(
        jaxkern.straight_through, derivative="one_plus_sigmoid"
    ),
    "reinmax": jaxkern.reinmax,
    "binary_concrete": partial(jaxkern.binary_concrete, temperature=0.5),
}
# These estimators draw masks while they learn, and start with few weights off.
DRAWN = ("reinmax", "binary_concrete")
INITIAL, INITIAL_DRAWN = 1.0, 3.0
model_of = partial(
    QuadraticTransformer, VOCAB, EMBED, num_heads=HEADS, num_layers=LAYERS
)


def sequences(key: jax.Array, count: int) -> jax.Array:
    half = jax.random.randint(key, (count, HALF), 0, VOCAB)
    return jnp.concatenate([half, half], axis=1)


def copy_loss(model: QuadraticTransformer, ids: jax.Array) -> jax.Array:
    """Return the loss of the second half, whose tokens can be known."""
    logits, targets = model(ids[:, :-1])[:, HALF - 1 :], ids[:, HALF:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def train(steps: int) -> QuadraticTransformer:
    kernel_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    model = model_of(kernel_init=kernel_init, rngs=nnx.Rngs(0))
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, max(steps // 10, 1), steps)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        ids = sequences(key, BATCH)
        loss, gradients = nnx.value_and_grad(copy_loss)(model, ids)
        optimizer.update(model, gradients)
        return loss

    loss = jnp.nan
    for key in jax.random.split(jax.random.key(1), steps):
        loss = step(model, optimizer, key)
    print(f"model: loss {float(loss):.3f} of a guess's {jnp.log(VOCAB):.3f}")
    return model


def divergence(model: QuadraticTransformer, ids, teacher, key=None) -> jax.Array:
    """Return the KL divergence from the teacher, summed over a sequence's tokens."""
    student = jax.nn.log_softmax(model(ids, key=key))
    return (jnp.exp(teacher) * (teacher - student)).sum((-2, -1)).mean()


def make_step(ids: jax.Array, teacher: jax.Array, drawn: bool):
    def loss(model, price, key):
        logits = jax.tree.leaves(nnx.state(model, MaskLogits))
        on = sum(jax.nn.sigmoid(x).sum() for x in logits) / sum(x.size for x in logits)
        faithful = divergence(model, ids, teacher, key if drawn else None)
        return faithful + price * on

    @nnx.jit
    def step(model, optimizer, price, key):
        # Only masks have gradients, so the weights are frozen.
        where = nnx.DiffState(0, MaskLogits)
        gradients = nnx.grad(loss, argnums=where)(model, price, key)
        optimizer.update(model, gradients)

    return step


def learn(
    base: QuadraticTransformer, name: str, ids: jax.Array, steps: int
) -> list[tuple[float, float]]:
    """Return sparsity and divergence at each price, of masks with a threshold of 0."""
    teacher = jax.nn.log_softmax(base(ids))
    step = make_step(ids, teacher, name in DRAWN)
    masked = partial(model_of, masked_layers=[0], num_masks=len(ids), rngs=nnx.Rngs(0))
    evaluate = nnx.jit(divergence)
    points = []
    for price in PRICES:
        initial = INITIAL_DRAWN if name in DRAWN else INITIAL
        model = masked(estimator=ESTIMATORS[name], initial_logit=initial)
        nnx.update(model, nnx.state(base, nnx.Param))
        rate = optax.linear_schedule(0.0, 0.05, max(steps // 20, 1))
        transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
        optimizer = nnx.Optimizer(model, transform, wrt=MaskLogits)
        for key in jax.random.split(jax.random.key(2), steps):
            step(model, optimizer, price, key)
        hard = masked()
        nnx.update(hard, nnx.state(model))
        sparsity = float(hard.sparsity()["total"].mean())
        points.append((sparsity, float(evaluate(hard, ids, teacher))))
        print(f"{name:<18}{price:6g}{100 * sparsity:10.1f} %{points[-1][1]:10.3f}")
    return points


def plot(frontier: dict[str, list[tuple[float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for name, points in frontier.items():
        sparsity, divergences = zip(*sorted(points), strict=True)
        axis.plot([100 * s for s in sparsity], divergences, "o-", ms=4, label=name)
    axis.set_xlabel("weights of the first MLP that are off, %")
    axis.set_ylabel("KL from the whole model, nats a sequence")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.grid(lw=0.4)
    axis.legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_plot(parser, "the frontier")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the model")
    parser.add_argument("--mask-steps", type=int, default=MASK_STEPS)
    args = parser.parse_args(argv)
    for name, least in (("steps", 2), ("mask_steps", 1)):
        if (given := getattr(args, name)) < least:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least {least}, got {given}")
    check_plot(parser, args.plot)
    return args


def main(argv: list[str] | None = None) -> dict[str, list[tuple[float, float]]]:
    args = parse(argv)
    base = train(args.steps)
    ids = sequences(jax.random.key(3), SAMPLES)
    print(f"{'':<18}{'price':>6}{'off':>12}{'KL':>10}", flush=True)
    frontier = {name: learn(base, name, ids, args.mask_steps) for name in ESTIMATORS}
    if args.plot:
        plot(frontier, args.plot)
    return frontier


if __name__ == "__main__":
    run_program(main)
