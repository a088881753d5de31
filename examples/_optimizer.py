"""The optimizer of `train_lm.py`: a chain of optax's parts."""

import argparse
from typing import Any

import jax
import optax


def make_schedule(args: argparse.Namespace) -> optax.Schedule:
    """Return the learning rate: linear warm-up, then cosine decay to a tenth."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        args.learning_rate,
        warmup_steps=args.warm_up,
        decay_steps=max(2, args.steps),
        end_value=args.learning_rate / 10,
    )


def decays(weights: Any) -> Any:
    """Tell of each weight if it decays, as those of products do and no others."""

    def is_factor(path: Any, weight: Any) -> bool:
        name = jax.tree_util.keystr(path)
        kept = ("norm", "bias", "'b_", "sinks", "embedding")
        return not any(text in name for text in kept)

    return jax.tree.map_with_path(is_factor, weights)


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """Return AdamW with clipped gradients, which several batches may add up to.

    Its state is in the dtype of the weights, float32.
    """
    adam = optax.adamw(
        make_schedule(args), b2=0.95, weight_decay=args.weight_decay, mask=decays
    )
    optimizer = optax.chain(
        optax.snapshot("gradient_norm", optax.tree.norm),
        optax.clip_by_global_norm(args.clip),
        adam,
    )
    if args.accumulate > 1:
        multi = optax.MultiSteps(optimizer, every_k_schedule=args.accumulate)
        optimizer = multi.gradient_transformation()
    return optimizer
