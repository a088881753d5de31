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

from ._harness import BOTH, FORWARD, PLAIN, Check, Program, Row, check_against

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
MLP: dict[str, Callable[[Size], Callable[..., Any] | None]] = {
    "swiglu": lambda size: None,
    "low-rank-swiglu": lambda size: partial(LowRankSwiGLU, rank=size.embed_dim // 4),
    "low-rank-relu2": lambda size: partial(LowRankReLU2, rank=size.embed_dim // 4),
    "2:4": lambda size: partial(LowRankReLU2, rank=size.embed_dim // 4, sparsity="2:4"),
    "2:4-static": lambda size: partial(
        LowRankReLU2, rank=size.embed_dim // 4, sparsity="2:4-static"
    ),
    "multi-head": lambda size: partial(MultiHeadMLP, num_heads=size.heads, gated=True),
}


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
    def is_dense(self) -> bool:
        """The published model, which the plain form is too."""
        return (self.attention, self.mlp) in (("dense", "swiglu"), ("cudnn", "swiglu"))

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

    def state(self, layers: Layers) -> Any:
        """The state of the model, made on the devices that hold it."""

        def make():
            return nnx.state(self.model(layers))

        mesh = self.make_mesh()
        if mesh is None:
            return make()
        places = get_sharding(
            nnx.state(nnx.eval_shape(partial(self.model, layers))), mesh
        )
        return jax.jit(make, out_shardings=places)()

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
    loss, weights = _loss_and_weights(replace(task, what="forward"), by, layers)
    match task.what:
        case "forward":
            return loss, (weights,)
        case "forward+backward":
            return jax.value_and_grad(loss), (weights,)
    adam = make_adam()
    return make_step(loss, adam), (weights, _moments(task, adam, weights))


def _moments(task: Task, adam: Any, weights: Any) -> Any:
    mesh = task.make_mesh()
    if mesh is None:
        return adam.init(weights)
    places = get_sharding(jax.eval_shape(adam.init, weights), mesh)
    return jax.jit(adam.init, out_shardings=places)(weights)


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


def _loss_and_weights(task: Task, by: str, layers: Layers) -> tuple[Any, Any]:
    # The parameters of a model do not depend on its context.
    key = replace(task, context=0), by, layers
    if key not in _kept:
        _kept.clear()
        state = task.state("unrolled" if by == PLAIN else layers)
        if by == PLAIN:
            state = definitions.from_state(nnx.to_pure_dict(state))
        _kept[key] = state
    if by == PLAIN:
        return partial(_plain_loss, task.dtype), _kept[key]
    graph = nnx.graphdef(nnx.eval_shape(partial(task.model, layers)))
    return partial(_our_loss, graph), _kept[key]


def _our_loss(graph, state, tokens, targets):
    return nnx.merge(graph, state).loss(tokens, targets)


def _plain_loss(dtype, weights, tokens, targets):
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
    """The loss by the plain form, or by our own model where it has none."""
    if not task.is_dense:
        run = jax.jit(lambda model: model.loss(*task.ids()))
        return float(run(task.model("unrolled")))
    state = nnx.to_pure_dict(nnx.state(task.model("unrolled")))
    run = jax.jit(partial(_plain_loss, task.dtype))
    return float(run(definitions.from_state(state), *task.ids()))


def _check_shallow(task: Task, by: str, layers: Layers) -> Check:
    """Against float64, within twice the error of the plain form in the same dtype."""
    plain, exact = _references(replace(task, remat=False, mesh=None))
    ours = plain
    if by != PLAIN:
        graph = nnx.graphdef(nnx.eval_shape(partial(task.model, layers)))
        ours = _compute(_our_loss, (graph, task.state(layers)), task.ids())
        ours = _leaves(ours, definitions.from_state if task.is_dense else _unstack)
    return check_against(ours, plain, exact, jnp.dtype(task.dtype))


@cache
def _references(task: Task) -> tuple[Any, Any]:
    """Loss and gradients by the plain form, in the dtype and in float64.

    Forms that the plain one does not have are held to our own unrolled model.
    """
    ids = task.ids()
    graph, state = nnx.split(task.model("unrolled"))
    if task.is_dense:
        weights = definitions.from_state(nnx.to_pure_dict(state))
        plain = _compute(_plain_loss, (task.dtype, weights), ids)
        exact = _compute(_plain_loss, ("float64", weights), ids, in_float64)
        return _leaves(plain, lambda x: x), _leaves(exact, lambda x: x)
    plain = _compute(_our_loss, (graph, state), ids)
    with jax.enable_x64(True):
        wide = replace(task, dtype="float64")
        graph = nnx.graphdef(nnx.eval_shape(partial(wide.model, "unrolled")))
    exact = _compute(_our_loss, (graph, state), ids, in_float64)
    return _leaves(plain, _unstack), _leaves(exact, _unstack)


def _compute(loss, arguments, ids, run=lambda fn, *args: jax.jit(fn)(*args)):
    static, weights = arguments
    return run(jax.value_and_grad(partial(loss, static)), weights, *ids)


def _unstack(state):
    return state | {"layers": definitions.unscanned(state["layers"])}


def _leaves(result, convert) -> list[np.ndarray]:
    """The loss, and the gradients in the order of what `convert` makes of them."""
    loss, gradients = result
    if isinstance(gradients, nnx.State):
        gradients = nnx.to_pure_dict(gradients)
    leaves = jax.tree.leaves((loss, convert(gradients)))
    return [np.asarray(x, np.float64) for x in leaves]
