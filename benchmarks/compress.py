"""How much of the outputs do compressed weights lose, and what do their MLPs cost?

    python -m benchmarks.compress          20 problems and the times of the MLPs; on a
                                           CPU of an 8th of the width
    python -m benchmarks.compress --full   the whole width, on a CPU too

A problem is one weight whose singular values fall as 1 / sqrt(i), and inputs whose
features are correlated and differ in size. The error is |X (W - W')| / |X W|, in
float64, and its mean and deviation are those of the same 20 problems for all methods.
The times are of a SwiGLU whose three weights have the same form.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkern
from jaxkern import nn
from jaxkern.compress import _low_rank, _sparse
from jaxkern.testing import plain

from . import frame
from ._cli import refuse, run_program
from ._figures import Figure, Panel, Point
from ._harness import FORWARD, PICKED, Case, Program, Row, labels
from ._mlp_programs import check
from ._report import Table, field, grouped, listing, steady, time

PROBLEMS = 20
# embed_dim, hidden_dim and tokens of a Llama of 130M parameters; a CPU has an 8th.
SIZES, CPU_PART = (768, 2048, 8192), 8
# The parameters that are kept, as a part of those of the weight.
SHARES = 0.125, 0.25, 0.375, 0.5, 0.75
LOW_RANK = {"SVD": False, "SVD-LLM": True}
SPARSE = "magnitude", "wanda", "sparsegpt"
BOTH_WAYS = "along both axes"
COMPOSED = "SVD-LLM, then sparsegpt"
PROBLEM, TIME = "compress", "CompressedMLP"


@cache
def problem(seed: int, d_in: int, d_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and a weight in float64."""
    rng = np.random.default_rng(seed)
    mix = np.eye(d_in) + rng.standard_normal((d_in, d_in)) / np.sqrt(d_in)
    x = rng.standard_normal((4 * d_in, d_in)) @ mix
    x *= np.exp(rng.standard_normal(d_in) / 2)
    left = np.linalg.qr(rng.standard_normal((d_in, d_in)))[0]
    values = 1 / np.sqrt(np.arange(1, d_in + 1))
    right = rng.standard_normal((d_in, d_out)) / np.sqrt(d_out)
    return x, (left * values) @ right


def rank_of(share: float, d_in: int, d_out: int, sparse: bool = False) -> int:
    """Return the rank whose factors have this part of a weight's parameters."""
    rank = share * (1 + sparse) * d_in * d_out / (d_in + d_out)
    return max(4, int(rank) // 4 * 4)


def compressed(method: str, share: float, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return what a method makes of a weight."""
    moment, kernel = (jnp.asarray(a, jnp.float32) for a in (x.T @ x, w))
    if method in LOW_RANK:
        root = _low_rank.root_of(moment) if LOW_RANK[method] else None
        pair = _low_rank.closest_factors(kernel, root, rank_of(share, *w.shape))
        return np.asarray(pair[0], float) @ np.asarray(pair[1], float)
    if method == COMPOSED:
        root, rank = _low_rank.root_of(moment), rank_of(share, *w.shape, sparse=True)
        first, second = _low_rank.closest_factors(kernel, root, rank)
        first = _sparse.prune(first, moment, "sparsegpt", False)
        inner = first.T @ moment @ first
        second = _sparse.prune(second, inner, "sparsegpt", False)
        return np.asarray(first, float) @ np.asarray(second, float)
    name: Any = method.removesuffix(f" {BOTH_WAYS}")
    return np.asarray(_sparse.prune(kernel, moment, name, name != method), float)


def errors(method: str, share: float, args: argparse.Namespace) -> Row:
    """Return the mean and the deviation of the error."""
    d_in, d_out, _ = args.sizes
    found = []
    for seed in range(PROBLEMS):
        x, w = problem(args.seed + seed, d_in, d_out)
        lost = x @ (w - compressed(method, share, x, w))
        found.append(np.linalg.norm(lost) / np.linalg.norm(x @ w))
    return {"lost": float(np.mean(found)), "lost_std": float(np.std(found))}


def packed(pair: tuple[jax.Array, jax.Array]) -> jaxkern.Packed24:
    """Return a packed weight, whose features are a multiple of 4, of its arrays."""
    return jaxkern.Packed24(*pair, 2 * pair[0].shape[1])


def sparse_swiglu(x: jax.Array, *weights: tuple[jax.Array, jax.Array]) -> jax.Array:
    gate, up, down = ([nn.Packed24Linear(packed(weight))] for weight in weights)
    return nn.CompressedMLP(up, down, gate=gate)(x)


def plain_sparse_swiglu(
    x: jax.Array, *weights: tuple[jax.Array, jax.Array]
) -> jax.Array:
    return plain.swiglu(x, *(jaxkern.unpack_2_4(packed(w)).mT for w in weights))


FORMS = {
    "dense": (jaxkern.swiglu, plain.swiglu),
    "low-rank": (jaxkern.low_rank_swiglu, plain.low_rank_swiglu),
    "2:4": (sparse_swiglu, plain_sparse_swiglu),
}


def build_mlp(form: str, share: float, args: argparse.Namespace) -> Program:
    """Return the forward of a SwiGLU whose weights have a form."""
    embed, hidden, tokens = args.sizes
    rng = np.random.default_rng(args.seed)

    def draw(*shape: int) -> jax.Array:
        values = rng.standard_normal(shape) / np.sqrt(shape[0])
        return jnp.asarray(values, args.dtype)

    def make(d_in: int, d_out: int) -> Any:
        match form:
            case "dense":
                return draw(d_in, d_out)
            case "2:4":
                weight = jaxkern.pack_2_4(draw(d_in, d_out).mT)
                return weight.values, weight.indices
        rank = rank_of(share, d_in, d_out)
        return draw(d_in, rank), draw(rank, d_out)

    shapes = (embed, hidden), (embed, hidden), (hidden, embed)
    inputs = np.sqrt(tokens) * draw(tokens, embed), *(make(*s) for s in shapes)
    run, definition = FORMS[form]
    return Program(run, inputs, partial(check, definition, inputs, False))


def make_cases(args: argparse.Namespace) -> list[Case]:
    sizes = dict(zip(("embed_dim", "hidden_dim", "tokens"), args.sizes, strict=True))
    low = [(name, share) for name in LOW_RANK for share in SHARES]
    sparse = [
        (f"{name}{more}", 0.5) for more in ("", f" {BOTH_WAYS}") for name in SPARSE
    ]
    some = [*low, *sparse, *((COMPOSED, share) for share in SHARES[:4])]
    forms = [("dense", 1.0), *(("low-rank", share) for share in SHARES), ("2:4", 0.5)]
    found = []
    for op, pairs, build in ((PROBLEM, some, errors), (TIME, forms, build_mlp)):
        for variant, share in pairs:
            named = labels(
                op, variant, PICKED, FORWARD, args.dtype, **sizes, kept=share
            )
            found.append(Case(named, partial(build, variant, share, args)))
    return found


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    refuse(parser, args, "all rows are ours", "peers")
    part = 1 if args.on_device or args.full else CPU_PART
    args.sizes = tuple(size // part for size in SIZES)


def notes(args: argparse.Namespace) -> dict[str, str]:
    d_in, d_out, tokens = args.sizes
    return {
        "problems": f"{PROBLEMS}, {d_in} by {d_out}, of {4 * d_in} inputs",
        "MLPs": f"SwiGLU of {d_in} and {d_out} features, {tokens} tokens",
        "kept": "of the parameters; of 2:4 weights half the entries count",
    }


def tables(rows: Sequence[Row], meta: frame.Meta) -> Iterator[Table]:
    for (op,), group in grouped(rows, "op").items():
        kept = {"kept": lambda row: f"{row['kept']:g}"}
        if op == PROBLEM:
            columns = kept | {"error": field("lost"), "± std": field("lost_std", 2)}
            title = "Relative error of the outputs, mean of the problems"
        else:
            columns = kept | {"ms": time, "± std": field("std_ms", 2)}
            title = "SwiGLU, forward, median ms"
        yield listing(title, group, lambda row: row["variant"], columns)


def figure(rows: Sequence[Row], meta: frame.Meta) -> Figure | None:
    """The error and the time against the parameters, one line a method or form."""
    panels = []
    for (op,), group in grouped([r for r in rows if r["status"] == "ok"], "op").items():
        y, of, spread = ("error", "lost", "lost_std")
        if op == TIME:
            y, of, spread = ("ms", "time_ms", "std_ms")
            group = [row for row in group if steady(row)]
        series: dict[str, list[Point]] = {}
        for row in group:
            point = Point(row["kept"], row[of], row[spread])
            series.setdefault(row["variant"], []).append(point)
        if series:
            title = "outputs" if op == PROBLEM else "SwiGLU, forward"
            panels.append(Panel(title, "kept parameters", y, series))
    return Figure([[panel] for panel in panels]) if panels else None


BENCHMARK = frame.Benchmark(
    name="compress",
    question=__doc__ or "",
    cases=make_cases,
    tables=tables,
    describe=("op", "variant", "kept kept"),
    settle=settle,
    notes=notes,
    figure=figure,
)
main = partial(frame.main, BENCHMARK)


if __name__ == "__main__":
    run_program(main)
