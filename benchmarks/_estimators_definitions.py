"""Inputs of `benchmarks.estimators`, and the results that its rows must have."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jaxkern
from jaxkern._masked.forms import Method
from jaxkern.nn import MaskLogits, QuadraticTransformer
from jaxkern.testing import plain, relative_error
from jaxkern.testing.plain import quadratic
from jaxkern.testing.plain.transformer import token_losses

from ._harness import Check, allowed_error, in_both, skip_unsupported

VOCAB, EMBED, HEADS, LAYERS, HIDDEN, SEQ = 4096, 512, 8, 3, 2048, 256
KERNELS = quadratic.WEIGHTS
Sizes = tuple[int, int, int]  # (seq, d_in, hidden)
# A method by XLA, one mask for all samples, or the kernels.
Form = Method | Literal["current", "kernel"]
# Not the published 0.02, with which masks would hardly move the loss and no check of it
# could find them wrong.
INIT = nnx.initializers.normal(0.05)


ESTIMATORS: dict[str, Any] = {
    "straight_through": jaxkern.straight_through,
    "one_plus_sigmoid": partial(
        jaxkern.straight_through, derivative="one_plus_sigmoid"
    ),
    "reinmax": jaxkern.reinmax,
}


def options_of(estimator: str, form: Form) -> dict[str, Any]:
    """Options of `masked_bilinear`."""
    return {
        "estimator": ESTIMATORS[estimator],
        "method": "fused" if form in ("current", "kernel") else form,
        "implementation": "mosaic_gpu" if form == "kernel" else "xla",
    }


def _make_model(seed: int, **options: Any) -> QuadraticTransformer:
    return QuadraticTransformer(
        VOCAB,
        EMBED,
        num_heads=HEADS,
        num_layers=LAYERS,
        hidden_dim=HIDDEN,
        rngs=nnx.Rngs(seed),
        **options,
    )


@lru_cache(maxsize=1)
def base_model(seed: int) -> tuple[Any, Any]:
    """The frozen weights, as a state and as nested dicts."""
    state = nnx.state(_make_model(seed, kernel_init=INIT), nnx.Param)
    return state, nnx.to_pure_dict(state)


def masked_model(estimator: str, method: Form, batch: int, dtype: Any) -> Any:
    """Graph of the model with masks in the first layer, and an example of its logits.

    method: a form of `masked_bilinear`, or "current", one mask that all samples share.
    """
    shared = method == "current"

    def make() -> Any:
        return _make_model(
            0,
            masked_layers=[0],
            num_masks=None if shared else batch,
            **options_of(estimator, method),
            dtype=dtype,
        )

    graph, _, logits = nnx.split(nnx.eval_shape(make), nnx.Param, MaskLogits)
    return graph, logits


def normal(shape: tuple[int, ...], *seed: int, scale: float = 1.0) -> np.ndarray:
    """By NumPy: JAX would compile a program for every shape."""
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return np.float32(scale) * drawn


@lru_cache(maxsize=2)
def mask_logits(
    seed: int, batch: int, embed: int, hidden: int
) -> tuple[jax.Array, ...]:
    """Logits of both signs; the first samples have the same ones in every batch."""
    shapes = (embed, hidden), (embed, hidden), (hidden, embed)
    return tuple(
        jnp.asarray(np.stack([normal(shape, seed, 1, i, b) for b in range(batch)]))
        for i, shape in enumerate(shapes)
    )


def token_ids(seed: int, batch: int) -> jax.Array:
    rows = [
        np.random.default_rng((seed, 2, b)).integers(0, VOCAB, SEQ, np.int32)
        for b in range(batch)
    ]
    return jnp.asarray(np.stack(rows))


def layer_inputs(seed: int, batch: int, sizes: Sizes, dtype: Any) -> tuple[Any, ...]:
    """(dy, h, weights, biases) and then the logits, which stay float32."""
    seq, embed, hidden = sizes
    shapes = (embed, hidden), (embed, hidden), (hidden, embed)
    weights = tuple(
        normal(s, seed, 3, i, scale=s[0] ** -0.5) for i, s in enumerate(shapes)
    )
    biases = tuple(normal(s[1:], seed, 4, i) for i, s in enumerate(shapes))
    dy, h = (normal((batch, seq, embed), seed, 5, i) for i in range(2))
    rest = jax.tree.map(lambda a: jnp.asarray(a, dtype), (dy, h, weights, biases))
    return *rest, mask_logits(seed, batch, embed, hidden)


def hard(logits: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: (x > 0).astype(dtype), logits)


# Rows of one batch follow each other.
@lru_cache(maxsize=1)
def layer_results(seed: int, batch: int, sizes: Sizes, dtype: Any) -> tuple[Any, Any]:
    """Twice: y, and the gradients of h, weights, biases, masks."""
    dy, h, weights, biases, logits = layer_inputs(seed, batch, sizes, dtype)

    def layer(h, weights, biases, masks):
        return plain.masked_bilinear(h, weights, masks, biases)

    arguments = dy, h, weights, biases, hard(logits, dtype)
    return in_both(dtype, plain.with_gradients(layer), *arguments)


@lru_cache(maxsize=1)
def model_results(seed: int, batch: int, dtype: Any) -> tuple[Any, Any]:
    """In the dtype and in float64, sample by sample: token losses, and the gradients of
    their mean for the masks."""
    _, state = base_model(seed)
    masks = hard(mask_logits(seed, batch, EMBED, HIDDEN), dtype)

    def run(state, masks, ids):
        def sample(part):
            one, ids = part

            def loss(masks):
                named = {(0, n): m[None] for n, m in zip(KERNELS, masks, strict=True)}
                tokens = token_losses(
                    quadratic.logits(state, named, ids[None]), ids[None]
                )
                return tokens.mean(), tokens[0]

            gradients, tokens = jax.grad(loss, has_aux=True)(one)
            return tokens, gradients

        return lax.map(sample, (masks, ids))

    return in_both(dtype, run, state, masks, token_ids(seed, batch))


def _check(results: Any, dtype: Any) -> Callable[[Any], Check]:
    """Hold what a row computes to the exact results; the bound is computed once."""
    in_dtype, exact = results
    bound = allowed_error(in_dtype, exact, dtype)
    return lambda got: Check(relative_error(got, exact), bound)


@lru_cache(maxsize=1)
def _slopes(
    estimator: str, seed: int, batch: int, embed: int, hidden: int
) -> tuple[Any, ...]:
    logits = mask_logits(seed, batch, embed, hidden)
    return tuple(plain.SLOPES[estimator](np.asarray(x, np.float64)) for x in logits)


def _estimated(slopes: Any, masks: Any) -> Any:
    """From gradients of the masks to those of the logits."""
    pairs = zip(masks, slopes, strict=True)
    return tuple((m * slope).astype(m.dtype) for m, slope in pairs)


@lru_cache(maxsize=1)
def expected_layer(
    estimator: str, seed: int, batch: int, sizes: Sizes, dtype: Any
) -> Callable[[Any], Check]:
    """The check of the layer's results."""
    slopes = _slopes(estimator, seed, batch, *sizes[1:])

    def estimated(results):
        y, (d_h, d_weights, d_biases, d_masks) = results
        return y, (d_h, d_weights, d_biases, _estimated(slopes, d_masks))

    return _check(map(estimated, layer_results(seed, batch, sizes, dtype)), dtype)


@lru_cache(maxsize=2)
def expected_model(
    estimator: str, which: str, seed: int, batch: int, most: int, dtype: Any
) -> Callable[[Any], Check]:
    """The check of the first samples of the largest batch, computed once for all."""

    def first(results):
        tokens, d_masks = results
        if which == "forward":
            return tokens[:batch].mean(dtype=np.float64), tokens[:batch]
        masks = tuple(d[:batch] / batch for d in d_masks)
        return _estimated(_slopes(estimator, seed, batch, EMBED, HIDDEN), masks)

    return _check(map(first, model_results(seed, most, dtype)), dtype)


class Passes:
    """Forward, which also returns all that the backward needs, and backward, apart.

    What is kept for the backward but is one of the arguments is no result.
    """

    def __init__(self, estimator: str, method: Form, batch: int, seed: int, dtype: Any):
        self.graph, example = masked_model(estimator, method, batch, dtype)
        arrays = mask_logits(seed, batch, EMBED, HIDDEN)
        if method == "current":
            arrays = jax.tree.map(lambda x: x[0], arrays)
        # Flax sorts the names.
        by_name = sorted(zip(KERNELS, arrays, strict=True))
        arrays = [array for _, array in by_name]
        logits = jax.tree.unflatten(jax.tree.structure(example), arrays)
        self.args = logits, base_model(seed)[0], token_ids(seed, batch)
        self.kept: list[jax.Array] | None = None
        self.places: list[int | None] = []
        self.structure: Any = None

    def forward(self, logits, state, ids):
        def mean(logits):
            tokens = token_losses(nnx.merge(self.graph, state, logits)(ids), ids)
            return tokens.mean(), tokens

        loss, vjp, tokens = jax.vjp(mean, logits, has_aux=True)
        leaves, self.structure = jax.tree.flatten(vjp)
        given = {id(x): i for i, x in enumerate(jax.tree.leaves((logits, state, ids)))}
        self.places = [given.get(id(leaf)) for leaf in leaves]
        kept = [leaf for leaf in leaves if id(leaf) not in given]
        return (loss, tokens), kept

    def backward(self, kept, logits, state, ids):
        given, kept = jax.tree.leaves((logits, state, ids)), iter(kept)
        leaves = [next(kept) if p is None else given[p] for p in self.places]
        (gradients,) = jax.tree.unflatten(self.structure, leaves)(jnp.ones(()))
        return gradients

    def run_forward(self) -> None:
        skip_unsupported(self.forward, self.args)
        if self.kept is None:
            _, self.kept = jax.jit(lambda *args: self.forward(*args))(*self.args)


@lru_cache(maxsize=1)
def make_passes(*key: Any) -> Passes:
    return Passes(*key)


def check_forward(passes: Passes, key: tuple[Any, ...], run: Any) -> Check:
    (loss, tokens), passes.kept = run(*passes.args)
    return expected_model(*key)((loss, tokens))


def check_backward(args: Any, batch: int, key: tuple[Any, ...], run: Any) -> Check:
    gradients = dict(nnx.to_flat_state(run(*args)))
    by_name = {path[-1]: np.asarray(g[...]) for path, g in gradients.items()}
    got = tuple(by_name[f"{name}_logits"] for name in KERNELS)
    # "current" has no axis of samples.
    got = tuple(g.reshape(batch, *g.shape[-2:]) for g in got)
    return expected_model(*key)(got)


def layer(estimator: str, method: Form):
    options = options_of(estimator, method)

    def run(h, weights, biases, logits):
        return jaxkern.masked_bilinear(h, weights, logits, biases=biases, **options)

    return run
