"""Compression of a language model's MLPs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Integer

from .._core.checks import (
    check_flag,
    check_integer,
    check_number,
    kind_of,
    raise_unknown,
)
from .._core.precision import widen
from .._sparsity.packed import Packed24, pack_2_4, unpack_2_4
from .._sparsity.select import GROUP
from ..nn._common import check_tokens, read_tokens, relative_loss
from ..nn._layers import layers_in_list
from ..nn._transformer import TransformerLM
from ._calibration import (
    Loss,
    Moment,
    add_inputs,
    add_outputs,
    chosen_layers,
    empty_loss,
    empty_moment,
    stream,
)
from ._low_rank import LowRankMethod, Tied, by_size, closest_factors, root_of, tie
from ._parts import Parts, as_plain, put_together, ranks_of, shape_of, take_apart
from ._report import LayerReport, Report
from ._sparse import SparseMethod, prune

Method = Literal["svd", "svd_llm", "magnitude", "wanda", "sparsegpt", "activations"]
# The methods that need the inputs of the weights.
CALIBRATED = "svd_llm", "wanda", "sparsegpt"
OP = "compress"


class _Plan(NamedTuple):
    """The checked arguments of `compress` that say how."""

    low_rank: LowRankMethod | None
    sparse: SparseMethod | None
    activations: bool
    rank: int | None
    energy: float | None
    target_parameters: int | None
    transposable: bool


def compress(
    model: TransformerLM,
    *,
    method: Method | tuple[LowRankMethod, SparseMethod],
    rank: int | None = None,
    energy: float | None = None,
    target_parameters: int | None = None,
    calibration: Integer[Array, "sequences seq"] | None = None,
    batch_size: int = 8,
    layers: Sequence[int] | None = None,
    transposable: bool = False,
) -> tuple[TransformerLM, Report]:
    r"""Return a language model whose MLPs are smaller, and a report.

    $$\min_{\hat W} \|X (W - \hat W)\|_F$$

    for each weight $W$ of an MLP, where the rows of $X$ are its inputs on the
    calibration tokens, or $X = I$ for the methods without calibration. $\hat W$ is
    low-rank, 2:4-sparse, or a product of 2:4-sparse low-rank factors. The methods:

    - "svd": the closest low-rank weight, whatever the inputs.
    - "svd_llm": the low-rank weight with the closest outputs. It is the exact minimum.
    - "magnitude": of each four weights that are summed, the two of largest $|w|$ stay.
    - "wanda": the two of largest $|w_{ij}| \|x_i\|$ stay, which is the minimum for
      uncorrelated inputs.
    - "sparsegpt": weights are chosen and changed row after row, so that the weights
      that stay correct the error so far.
    - "activations": of each four activations of a token the two largest stay. The MLP
      must be squared ReLU without a gate, which makes most of them zero anyway.
    - A pair such as ("svd_llm", "sparsegpt"): the low-rank weights, then their factors
      2:4.

    The low-rank methods need a size: one of `rank`, `energy` and `target_parameters`.
    Gate and up of an MLP get the same rank, since kernels take no others. A weight is
    never given a rank with which it would not become smaller.

    The new MLPs are `LowRankSwiGLU` and `LowRankReLU2` where these fit, and else
    `CompressedMLP`. The new model has its layers in a list (`scan_layers=False`). It
    shares the arrays of everything else with the given model, so donate them only if
    you no longer need that one. It can be trained on, whatever the method: which of
    2:4-sparse weights are kept does not change then.

    The calibration tokens are run twice, in batches, in one program for all layers.
    What is kept of them are the second moments of the inputs of each MLP and of its
    activated layer, in float32: 4 (embed_dim^2 + hidden_dim^2) bytes a layer. Compress
    a few `layers` at a time for less; later layers then see what the earlier ones have
    become.

    Args:
        model: The trained model. Its MLPs are `SwiGLU`, `MLP`, `LowRankSwiGLU`,
            `LowRankReLU2` or a `CompressedMLP` without 2:4-sparse weights. All families
            of decoder-only models that `TransformerLM` names have such.
        method: See above.
        rank: The rank of all weights.
        energy: Give each weight the smallest rank that keeps this share, from 0 to 1,
            of the squared singular values, for "svd_llm" of those of the outputs.
        target_parameters: Give the weights of all chosen layers the ranks with which
            the whole model has at most this many parameters, and the sum of the lost
            shares is smallest.
        calibration: Tokens that are like those that the model will see; a few hundred
            sequences are usual. With them, the report has the error of the outputs.
        batch_size: The number of sequences that are run at once.
        layers: The indices of the layers to compress; None for all.
        transposable: Choose weights that are 2:4-sparse along both axes, so that the
            products of the backward pass can be sparse, too. Of each 4 by 4 weights
            there are then two in each row and in each column.

    Returns:
        The new model, and the report. `print(report)` shows a line for each layer.

    Raises:
        TypeError: `model` is not a `TransformerLM`, an MLP is of another class (a
            subclass with another call, such as an MLP with LoRA, is refused: merge it
            first), `calibration` is not an integer array, or a number or a flag is
            something else.
        ValueError: `method` is unknown; a size is missing, out of range or given for a
            method that takes none; calibration tokens are missing, out of range or too
            long; an index of `layers` is out of range; a weight or an input is not
            finite; a weight or an activation is 2:4-sparse already where that cannot
            be done twice; or a size is not a multiple of 4 with `transposable`.

    Examples:
        ```python
        import jax
        from flax import nnx
        from jaxkern import nn
        from jaxkern.compress import compress

        sizes = {"embed_dim": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32}
        model = nn.TransformerLM(16, 8, **sizes, rngs=nnx.Rngs(0))
        tokens = jax.random.randint(jax.random.key(0), (4, 8), 0, 16)
        small, report = compress(model, method="svd_llm", rank=4, calibration=tokens)
        print([line.mlp for line in report.layers], report.parameters)
        print(small(tokens).shape)
        ```
        ```text
        ['LowRankSwiGLU', 'LowRankSwiGLU'] 1768
        (4, 8, 16)
        ```

    References:
        SVD-LLM: https://arxiv.org/abs/2403.07378.
        Wanda: https://arxiv.org/abs/2306.11695.
        SparseGPT: https://arxiv.org/abs/2301.00774.
        Transposable masks: https://arxiv.org/abs/2102.08124.
        2:4 activations: https://arxiv.org/abs/2503.16672.
    """
    if not isinstance(model, TransformerLM):
        raise TypeError(f"{OP}: model must be a TransformerLM, got {kind_of(model)}")
    plan = _read(method, rank, energy, target_parameters, transposable)
    batch_size = check_integer(OP, "batch_size", batch_size)
    count = model.config.num_layers
    chosen = chosen_layers(OP, layers, count)
    if calibration is not None:
        check_tokens(OP, "calibration", calibration)
        calibration = read_tokens(OP, "calibration", calibration, model.vocab_size)
        if not calibration.size or calibration.shape[1] > model.context_length:
            raise ValueError(
                f"{OP}: calibration must be sequences of 1 to {model.context_length} "
                f"tokens, got shape {calibration.shape}"
            )
    needed = next((m for m in (plan.low_rank, plan.sparse) if m in CALIBRATED), None)
    if needed and calibration is None:
        raise ValueError(f"{OP}: calibration must be tokens for {needed!r}, got None")
    new = nnx.clone(model)
    new.layers, new.scan_layers = layers_in_list(model.layers, count), False
    parts = {i: take_apart(OP, _name(i), new.layers[i].mlp) for i in chosen}
    for i in chosen:
        _check_parts(_name(i), parts[i], plan)
    moments = {}
    if needed:
        moments = _measure(new, parts, calibration, batch_size)
    ranks = _choose_ranks(parts, moments, plan, count_parameters(model))
    mlps = {
        i: put_together(_compress(parts[i], moments.get(i, {}), ranks.get(i), plan))
        for i in chosen
    }
    errors: dict[int, float] = {}
    if calibration is not None:
        states = {i: empty_loss() for i in chosen}
        states = stream(new, calibration, batch_size, _compare, states, mlps)
        errors = {i: loss.relative() for i, loss in states.items()}
    lines = []
    for i in chosen:
        lines.append(_line(i, parts[i], new.layers[i].mlp, mlps[i], errors.get(i)))
        new.layers[i].mlp = mlps[i]
    return new, Report(tuple(lines), count_parameters(model), count_parameters(new))


def count_parameters(module: nnx.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _name(i: int) -> str:
    return f"the mlp of layer {i}"


def _read(method, rank, energy, target_parameters, transposable) -> _Plan:
    """Return the plan, after a check that its arguments go together."""
    check_flag(OP, transposable=transposable)
    names = tuple(method) if isinstance(method, tuple | list) else (method,)
    kinds = get_args(LowRankMethod), get_args(SparseMethod)
    pair = len(names) == 2 and all(m in k for m, k in zip(names, kinds, strict=True))
    if not pair and (len(names) != 1 or names[0] not in get_args(Method)):
        pairs = "a pair of the first two and the next three"
        raise_unknown(OP, "method", method, (*get_args(Method), pairs))
    low_rank = next((name for name in names if name in kinds[0]), None)
    sparse = next((name for name in names if name in kinds[1]), None)
    sizes: dict[str, Any] = {"rank": rank, "energy": energy}
    sizes["target_parameters"] = target_parameters
    given = [name for name, size in sizes.items() if size is not None]
    if low_rank and len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise ValueError(
            f"{OP}: one of rank, energy and target_parameters must be given for "
            f"{low_rank!r}, got {got}"
        )
    if given and not low_rank:
        raise ValueError(
            f"{OP}: {given[0]} must be None for {method!r}, got {sizes[given[0]]}"
        )
    for name in ("rank", "target_parameters"):
        if sizes[name] is not None:
            sizes[name] = check_integer(OP, name, sizes[name])
    if energy is not None:
        check_number(OP, "energy", energy, positive=True, most=1.0)
    if transposable and sparse is None:
        raise ValueError(f"{OP}: transposable must be False for {method!r}, got True")
    activations = names[0] == "activations"
    return _Plan(low_rank, sparse, activations, **sizes, transposable=transposable)


def _check_parts(name: str, parts: Parts, plan: _Plan) -> None:
    """Check that the MLP called `name` can be compressed as planned."""
    if parts.is_packed:
        raise ValueError(
            f"{OP}: {name} must have no 2:4-sparse weights yet, got packed ones"
        )
    for key, finite in _are_finite(parts.weights).items():
        if not finite:
            raise ValueError(
                f"{OP}: {name} must have finite weights, got NaN or infinity in {key}"
            )
    if plan.activations and (parts.activation, len(parts.weights)) != ("relu2", 2):
        gated = "gated " if "gate" in parts.weights else ""
        raise ValueError(
            f"{OP}: {name} must be squared ReLU without a gate for 'activations', "
            f"got {gated}{parts.activation!r}"
        )
    if parts.sparsity and (plan.activations or plan.sparse):
        raise ValueError(
            f"{OP}: {name} must have dense activations, since one operand of a matmul "
            f"can be sparse, got {parts.sparsity!r}"
        )
    for key, chain in parts.weights.items():
        inner = [shape_of(factor)[1] for factor in chain]
        d_in, d_out = shape_of(chain[0])[0], inner[-1]
        if plan.low_rank and d_in * d_out <= (d_in + d_out) * (plan.rank or 1):
            raise ValueError(
                f"{OP}: rank must be below d_in d_out / (d_in + d_out) = "
                f"{d_in * d_out / (d_in + d_out):.1f} for {key} of {name}, from which "
                f"on nothing is saved, got {plan.rank or 1}"
            )
        sizes = [d_in, *([plan.rank or GROUP, d_out] if plan.low_rank else inner)]
        if plan.transposable and any(size % GROUP for size in sizes):
            raise ValueError(
                f"{OP}: sizes must be multiples of 4 with transposable, got "
                f"{' by '.join(map(str, sizes))} for {key} of {name}"
            )


def _measure(model, parts, calibration, batch_size) -> dict[int, dict[str, jax.Array]]:
    """Return the second moments of the inputs of each weight, up to their scale."""
    states = {}
    for i, one in parts.items():
        sizes = (one.weights[name][0].shape[0] for name in ("up", "down"))
        states[i] = tuple(map(empty_moment, sizes))
    nothing = dict.fromkeys(states)
    states = stream(model, calibration, batch_size, _add_moments, states, nothing)
    moments = {}
    for i, (outer, inner) in states.items():
        if not all(_are_finite({"up": outer.total, "down": inner.total}).values()):
            raise ValueError(
                f"{OP}: calibration must give finite inputs to {_name(i)}, got NaN or "
                "infinity"
            )
        moments[i] = {"gate": outer.total, "up": outer.total, "down": inner.total}
    return moments


def _add_moments(
    state: tuple[Moment, Moment], mlp: nnx.Module, other: None, x: jax.Array
) -> tuple[tuple[Moment, Moment], jax.Array]:
    hidden = as_plain(take_apart(OP, "mlp", mlp)).hidden(x)
    outer, inner = state
    return (add_inputs(outer, x), add_inputs(inner, hidden)), mlp(x)


def _compare(
    state: Loss, mlp: nnx.Module, other: nnx.Module, x: jax.Array
) -> tuple[Loss, jax.Array]:
    y = mlp(x)
    return add_outputs(state, y, other(x)), y


def _choose_ranks(parts, moments, plan: _Plan, size: int) -> dict[int, dict[str, int]]:
    """Return the rank of each weight of each layer, or nothing if none is low-rank."""
    if plan.low_rank is None:
        return {}
    if plan.rank is not None:
        return {i: dict.fromkeys(one.weights, plan.rank) for i, one in parts.items()}
    tied: list[tuple[int, Tied]] = []
    for i, one in parts.items():
        weights = {name: whole(chain) for name, chain in one.weights.items()}
        roots = _roots(one, moments.get(i, {}), plan)
        first = tuple(name for name in weights if name != "down")
        for names in (first, ("down",)):
            tied.append((i, tie(weights, roots, names, plan.sparse is not None)))
    if plan.energy is not None:
        found = [one.by_energy(plan.energy) for _, one in tied]
    else:
        assert plan.target_parameters is not None
        chains = [c for one in parts.values() for c in one.weights.values()]
        fixed = size - sum(factor.size for chain in chains for factor in chain)
        least = fixed + sum(one.cost for _, one in tied)
        most = fixed + sum(one.cost * (one.most // one.step) for _, one in tied)
        if not least <= plan.target_parameters <= most:
            raise ValueError(
                f"{OP}: target_parameters must be from {least} to {most}, with the "
                "smallest and the largest ranks that save parameters, got "
                f"{plan.target_parameters}"
            )
        found = by_size([one for _, one in tied], plan.target_parameters - fixed)
    ranks: dict[int, dict[str, int]] = {i: {} for i in parts}
    for (i, one), rank in zip(tied, found, strict=True):
        ranks[i] |= dict.fromkeys(one.names, rank)
    return ranks


@jax.jit
def _are_finite(trees: dict[str, Any]) -> dict[str, jax.Array]:
    """Return whether all arrays of each tree are finite."""
    return {
        name: jnp.array([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]).all()
        for name, tree in trees.items()
    }


@jax.jit
def whole(chain: Sequence[Any]) -> jax.Array:
    """Return the weight in float32 that some factors are."""
    arrays = [
        unpack_2_4(factor).mT if isinstance(factor, Packed24) else factor
        for factor in chain
    ]
    product = widen(arrays[0])
    with jax.default_matmul_precision("highest"):
        for factor in arrays[1:]:
            product = product @ widen(factor)
    return product


def _roots(parts: Parts, moments, plan: _Plan) -> dict[str, jax.Array | None]:
    """Return the root of the second moment of the inputs of each weight."""
    if plan.low_rank != "svd_llm":
        return dict.fromkeys(parts.weights)
    outer, inner = root_of(moments["up"]), root_of(moments["down"])
    return {name: inner if name == "down" else outer for name in parts.weights}


def _compress(
    parts: Parts, moments: dict[str, jax.Array], ranks: Any, plan: _Plan
) -> Parts:
    """Return the compressed parts of one MLP."""
    if plan.activations:
        return replace(parts, sparsity="2:4")
    roots = _roots(parts, moments, plan) if plan.low_rank else {}
    weights = {}
    for name, chain in parts.weights.items():
        root, rank = roots.get(name), ranks[name] if ranks else None
        weights[name] = _factors(chain, root, rank, moments.get(name), plan)
    return replace(parts, weights=weights)


@partial(jax.jit, static_argnums=(2, 4))
def _factors(chain, root, rank: int | None, moment, plan: _Plan) -> tuple[Any, ...]:
    """Return the new factors of one weight, in the dtype of the old ones."""
    dtype, factors = chain[0].dtype, tuple(map(widen, chain))
    if rank is not None:
        factors = closest_factors(whole(chain), root, rank)
    if plan.sparse is None:
        return tuple(factor.astype(dtype) for factor in factors)
    packed = []
    for factor in factors:
        pruned = prune(factor, moment, plan.sparse, plan.transposable)
        packed.append(pack_2_4(pruned.astype(dtype).mT))
        if moment is not None:
            # The next factor gets the outputs of this one, up to their scale.
            largest = jnp.abs(pruned).max()
            unit = pruned / jnp.where(largest > 0, largest, 1)
            with jax.default_matmul_precision("highest"):
                moment = unit.mT @ moment @ unit
    return tuple(packed)


def _line(i: int, old: Parts, mlp, new_mlp, error: float | None) -> LayerReport:
    """Return the report of one layer."""
    new = take_apart(OP, _name(i), new_mlp)
    errors = {
        name: relative_loss(whole(chain), whole(new.weights[name]))
        for name, chain in old.weights.items()
    }
    return LayerReport(
        layer=i,
        mlp=type(new_mlp).__name__,
        ranks=ranks_of(new),
        weight_errors=errors,
        output_error=error,
        parameters_before=count_parameters(mlp),
        parameters=count_parameters(new_mlp),
        flops_before=old.flops(),
        flops=new.flops(),
    )
