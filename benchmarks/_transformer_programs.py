"""Programs of `benchmarks.transformer`, and their checks."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkern
from jaxkern.nn import (
    LowRankReLU2,
    LowRankSwiGLU,
    MultiHeadMLP,
    TransformerLM,
    get_sharding,
    make_mesh,
    parse_mesh_sizes,
)
from jaxkern.testing.plain import cast, in_float64
from jaxkern.testing.plain import transformer as definitions

from ._harness import BOTH, FORWARD, PLAIN, XLA, Check, Program, Row, check_against

VOCAB = 10_000
# Layers of the model whose gradients are checked; further ones repeat them.
CHECKED_LAYERS = 2
# Relative error of the whole model's loss, by the size of a number.
LOSS_BOUND = {4: 1e-5, 2: 1e-2}
TRACED_CALLS = 2

STEP = "optimizer step"
Pass = Literal["forward", "forward+backward", "optimizer step"]
Layers = Literal["scanned", "unrolled"]


@dataclass(frozen=True)
class Size:
    """One published model."""

    embed_dim: int
    hidden_dim: int
    layers: int
    heads: int


def _block_sparse(context: int):
    """Causal attention to the last quarter of the context."""
    block_size, window = max(1, context // 16), context // 4
    mask = jaxkern.BlockMask.causal(context, context, block_size=block_size)
    near = jaxkern.BlockMask.local_window(
        context, context, window=window, block_size=block_size
    )
    return partial(jaxkern.block_sparse_attention, mask=mask & near)


def _dilated(context: int):
    lengths = max(1, context // 4), max(1, context // 2), context
    dilation = jaxkern.Dilation(lengths, (1, 2, 4))
    return partial(jaxkern.dilated_attention, dilation=dilation)


ATTENTION: dict[str, Callable[[int], Callable[..., Any] | None]] = {
    "dense": lambda context: None,
    "cudnn": lambda context: partial(jaxkern.attention, implementation="cudnn"),
    "dilated": _dilated,
    "block-sparse": _block_sparse,
}


def _low_rank(module: Callable[..., Any], **options: Any):
    return lambda size: partial(module, rank=size.embed_dim // 4, **options)


MLP: dict[str, Callable[[Size], Callable[..., Any] | None]] = {
    "swiglu": lambda size: None,
    "low-rank-swiglu": _low_rank(LowRankSwiGLU),
    "low-rank-relu2": _low_rank(LowRankReLU2),
    "2:4": _low_rank(LowRankReLU2, sparsity="2:4"),
    "2:4-static": _low_rank(LowRankReLU2, sparsity="2:4-static"),
    "multi-head": lambda size: partial(MultiHeadMLP, num_heads=size.heads, gated=True),
}


# Forms of the published model.
PUBLISHED = ("dense", "swiglu"), ("cudnn", "swiglu")


@dataclass(frozen=True)
class Task:
    """The computation of a row: a model, its input, and a part of a training step."""

    size: Size
    context: int
    batch: int
    what: Pass
    attention: str
    mlp: str
    dtype: str
    remat: bool
    seed: int
    mesh: str | None = None

    @property
    def reference(self) -> str:
        """Who defines its results: the plain form, which is the published model.

        Other models are held to our own, unrolled.
        """
        return PLAIN if (self.attention, self.mlp) in PUBLISHED else XLA

    @property
    def tokens(self) -> int:
        return self.batch * self.context

    def model(self, layers: Layers) -> TransformerLM:
        size = self.size
        return TransformerLM(
            VOCAB,
            self.context,
            embed_dim=size.embed_dim,
            num_layers=size.layers,
            num_heads=size.heads,
            hidden_dim=size.hidden_dim,
            attention_fn=ATTENTION[self.attention](self.context),
            mlp=MLP[self.mlp](size),
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
            scan_layers=layers == "scanned",
            mesh=self.make_mesh(),
            rngs=nnx.Rngs(self.seed),
        )

    def make_mesh(self) -> jax.sharding.Mesh | None:
        if self.mesh is None:
            return None
        return make_mesh(**parse_mesh_sizes(self.mesh))

    def placed(self, make: Callable[..., Any], *args: Any) -> Any:
        """`make(*args)`, made on the devices that hold it."""
        mesh = self.make_mesh()
        if mesh is None:
            return make(*args)
        places = get_sharding(jax.eval_shape(make, *args), mesh)
        return jax.jit(make, out_shardings=places)(*args)

    def state(self, layers: Layers) -> Any:
        return self.placed(lambda: nnx.state(self.model(layers)))

    def trace(self, layers: Layers) -> None:
        """Raise ValueError for a model that does not fit the mesh; nothing runs."""
        mesh = self.make_mesh()
        graph, state = nnx.split(nnx.eval_shape(partial(self.model, layers)))
        if mesh is not None:
            get_sharding(state, mesh)
        ids = jax.ShapeDtypeStruct((self.batch, self.context), jnp.int32)
        jax.eval_shape(partial(_our_loss, graph), state, ids, ids)

    def flops(self) -> float:
        """FLOPs of the matmuls, three times for a backward; causality is not exploited.

        Attention other than dense is left out: only its projections count.
        """
        _, kernels = _count(self.size, self.mlp)
        per_token = 2 * (kernels + VOCAB * self.size.embed_dim)
        if self.attention in ("dense", "cudnn"):
            per_token += 4 * self.size.layers * self.context * self.size.embed_dim
        return float((1 if self.what == FORWARD else 3) * self.tokens * per_token)

    def needed_bytes(self) -> float:
        """Bytes of the weights, and beside them of the run or of the check."""
        size = self.size
        weights = 4.0 * _count(size, self.mlp)[0]
        kept = 1 if self.what == FORWARD or self.remat else size.layers
        features = (
            10 * size.embed_dim + 4 * size.hidden_dim + 3 * size.heads * self.context
        )
        run = 4.0 * self.tokens * (kept * features + VOCAB)
        # Gradients; with the optimizer new weights too, and old and new moments.
        run += {FORWARD: 0, BOTH: 1, STEP: 6}[self.what] * weights
        shallow = replace(size, layers=min(CHECKED_LAYERS, size.layers))
        # Three models and their gradients, one of them in float64, and those as NumPy.
        check = 56.0 * _count(shallow, self.mlp)[0]
        return weights + max(run, check, weights + 4.0 * self.tokens * features)

    def ids(self) -> tuple[jax.Array, jax.Array]:
        """Tokens and targets, at random."""
        shape = 2, self.batch, self.context
        ids = jax.random.randint(jax.random.key(self.seed + 1), shape, 0, VOCAB)
        mesh = self.make_mesh()
        if mesh is not None:
            place = jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp")))
            ids = jax.device_put(ids, place)
        return ids[0], ids[1]


@cache
def _count(size: Size, mlp: str) -> tuple[int, int]:
    """All parameters, and those of the layers' kernels."""
    task = Task(size, 1, 1, "forward", "dense", mlp, "float32", False, 0)
    state = nnx.state(nnx.eval_shape(partial(task.model, "scanned")))
    kernels = [p.size for p in jax.tree.leaves(state["layers"]) if p.ndim > 2]
    return sum(p.size for p in jax.tree.leaves(state)), sum(kernels)


def build(task: Task, by: str, layers: Layers, trace: Path | None) -> Program:
    """The row's program, with its weights made now unless the last row had them."""
    fn, weights = _program(task, by, layers)
    args = (*weights, *task.ids())
    seen: list[Callable[..., Any]] = []

    def check(run) -> Check:
        seen.append(run)
        return _check(task, by, layers, float(jax.tree.leaves(run(*args))[0]))

    def figures() -> Row:
        if trace is None:
            return {}
        with jax.profiler.trace(str(trace)):
            for _ in range(TRACED_CALLS):
                jax.block_until_ready(seen[0](*args))
        return {"trace": str(trace)}

    return Program(fn, args, check, figures=figures)


def _program(task: Task, by: str, layers: Layers) -> tuple[Any, tuple[Any, ...]]:
    """A function of weights and tokens, its first result the loss; and the weights."""
    loss, weights = _loss(task, by, layers), _weights(task, layers)
    match task.what:
        case "forward":
            return loss, (weights,)
        case "forward+backward":
            return jax.value_and_grad(loss), (weights,)
    adam = make_adam()
    return make_step(loss, adam), (weights, task.placed(adam.init, weights))


def make_adam() -> Any:
    import optax

    return optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)


def make_step(loss: Callable[..., Any], optimizer: Any) -> Callable[..., Any]:
    """From weights, moments and tokens to the loss and the next weights and moments."""

    def step(weights, moments, *ids):
        value, gradients = jax.value_and_grad(loss)(weights, *ids)
        updates, moments = optimizer.update(gradients, moments, weights)
        weights = jax.tree.map(jnp.add, weights, updates)
        return value, weights, moments

    return step


# Weights stay for the next row, and go when another model's are made.
_kept: dict[tuple[Any, ...], Any] = {}


def _weights(task: Task, layers: Layers) -> Any:
    # The parameters of a model do not depend on its context.
    key = replace(task, context=0, what="forward"), layers
    if key not in _kept:
        _kept.clear()
        _kept[key] = task.state(layers)
    return _kept[key]


def _loss(task: Task, by: str, layers: Layers) -> Callable[..., Any]:
    """The loss as a function of the model's state, of tokens and of targets."""
    if by == PLAIN:
        return partial(_plain_loss, task.dtype)
    return partial(_our_loss, nnx.graphdef(nnx.eval_shape(partial(task.model, layers))))


def _our_loss(graph, state, tokens, targets):
    return nnx.merge(graph, state).loss(tokens, targets)


def _plain_loss(dtype, state, tokens, targets):
    weights = definitions.from_state(nnx.to_pure_dict(state))
    return definitions.loss(cast(weights, dtype), tokens, targets)


def _check(task: Task, by: str, layers: Layers, found: float) -> Check:
    """The loss of the whole model, then all gradients of one of two layers."""
    bound = LOSS_BOUND[jnp.dtype(task.dtype).itemsize]
    expected = _plain_value(replace(task, what="forward", remat=False, mesh=None))
    error = abs(found - expected) / abs(expected)
    # Written so that a NaN fails.
    if not error <= bound:
        return Check(error if math.isfinite(error) else math.inf, bound)
    size = replace(task.size, layers=min(CHECKED_LAYERS, task.size.layers))
    task = replace(task, size=size, what="forward+backward")
    return _check_shallow(task, by, layers)


@cache
def _plain_value(task: Task) -> float:
    """The loss by its reference."""
    loss = _loss(task, task.reference, "unrolled")
    return float(jax.jit(loss)(task.state("unrolled"), *task.ids()))


def _check_shallow(task: Task, by: str, layers: Layers) -> Check:
    """Against float64, within twice the error of the plain form in the same dtype."""
    plain, exact = _references(replace(task, remat=False, mesh=None))
    ours = plain if by == PLAIN else _with_gradients(task, by, layers)
    return check_against(ours, plain, exact, jnp.dtype(task.dtype))


@cache
def _references(task: Task) -> tuple[Any, Any]:
    """Loss and gradients by the reference, in the dtype and in float64."""
    with jax.enable_x64(True):
        wide = _loss(replace(task, dtype="float64"), task.reference, "unrolled")
    state, ids = task.state("unrolled"), task.ids()
    exact = _leaves(in_float64(jax.value_and_grad(wide), state, *ids))
    return _with_gradients(task, task.reference, "unrolled"), exact


def _with_gradients(task: Task, by: str, layers: Layers) -> list[np.ndarray]:
    run = jax.jit(jax.value_and_grad(_loss(task, by, layers)))
    return _leaves(run(task.state(layers), *task.ids()))


def _leaves(result: tuple[Any, nnx.State]) -> list[np.ndarray]:
    """The loss and the gradients, those of scanned layers one by one."""
    loss, state = result
    gradients = nnx.to_pure_dict(state)
    gradients |= {"layers": definitions.unscanned(gradients["layers"])}
    leaves = jax.tree.leaves((loss, gradients))
    return [np.asarray(x, np.float64) for x in leaves]
