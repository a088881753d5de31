"""Are low-rank and 2:4-sparse MLPs faster than the full-rank SwiGLU, and right?

    python -m benchmarks.mlp            60M, 130M, 350M at 1 x 512 tokens;
                                        on a GPU every model at 1 and 32 x 512
    python -m benchmarks.mlp --full     8 models x 5 batches x every variant

The published study (PyTorch, RTX 3090, bfloat16) compares the four first variants; its
2:4 is the static mask. Beyond it: 2:4 chosen per token, and the selection alone.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxkern

from . import _mlp_definitions as definitions
from . import _mlp_report, _torch
from ._cli import make_parser, names
from ._harness import (
    Case,
    Options,
    Program,
    matmul_peak_tflops,
    with_gradients,
)
from ._mlp_torch import MODULES as TORCH_MODULES
from ._report import (
    execute,
    list_or_run,
    make_console,
    metadata,
    print_header,
    published,
)

SEQ = 512
BATCHES = (1, 4, 8, 16, 32)
WEIGHT_SCALE = 0.02
CPU_ITERATIONS = 40
OURS, PLAIN = "jaxkern", "plain jnp"


@dataclass(frozen=True)
class Model:
    """Sizes of one published configuration, and how often it was timed."""

    hidden: int
    intermediate: int
    rank: int
    iterations: int

    @property
    def relu2(self) -> int:
        """The ungated MLP is half as wide again."""
        return self.intermediate * 3 // 2


MODELS = {
    "60M": Model(512, 1376, 128, 100),
    "130M": Model(768, 2048, 256, 100),
    "350M": Model(1024, 2736, 256, 100),
    "1B": Model(2048, 5461, 512, 100),
    "7B": Model(4096, 11008, 1024, 100),
    "13B": Model(5120, 13824, 1280, 100),
    "33B": Model(6656, 17920, 1664, 50),
    "65B": Model(8192, 22016, 2048, 50),
}
CASES = [(model, batch) for model in MODELS for batch in BATCHES]
CPU_CASES = [(model, 1) for model in ("60M", "130M", "350M")]
GPU_CASES = [(model, batch) for model in MODELS for batch in (1, 32)]


@dataclass(frozen=True)
class Implementation:
    """Ours, the definition it is checked against, and the published row it answers."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    weights: str
    published: str | None = None


def _relu2(sparsity, select, published=None):
    ours = partial(jaxkern.low_rank_relu2, sparsity=sparsity)
    return Implementation(ours, partial(definitions.relu2, select), "relu2", published)


def _select(method, plain):
    ours = partial(jaxkern.sparsify_2_4, method=method)
    return Implementation(ours, plain, "activations")


IMPLEMENTATIONS = {
    "swiglu": Implementation(jaxkern.swiglu, definitions.swiglu, "full", "swiglu"),
    "low_rank_swiglu": Implementation(
        jaxkern.low_rank_swiglu,
        definitions.low_rank_swiglu,
        "swiglu",
        "low_rank_swiglu",
    ),
    "low_rank_relu2": _relu2(None, definitions.keep_all, "low_rank_relu2"),
    "low_rank_relu2 2:4-static": _relu2(
        "2:4-static", definitions.static, "low_rank_relu2_2to4"
    ),
    "low_rank_relu2 2:4": _relu2("2:4", definitions.top2),
    "low_rank_relu2 2:4-soft": _relu2("2:4-soft", definitions.soft),
    "static mask alone": _select("static", definitions.static),
    "2:4 alone": _select("top2", definitions.top2),
    "2:4-soft alone": _select("soft", definitions.soft),
}


def weight_shapes(model: Model, kind: str) -> Any:
    """A tree of shapes, in the order of the implementation's arguments after x."""
    h, m, r, w = model.hidden, model.intermediate, model.rank, model.relu2
    match kind:
        case "full":
            return ((h, m), (h, m), (m, h))
        case "swiglu":
            return (((h, r), (r, m)), ((h, r), (r, m)), ((m, r), (r, h)))
        case "relu2":
            return (((h, r), (r, w)), ((w, r), (r, h)))
        case _:
            return ()


def count_flops(model: Model, tokens: int, name: str) -> float:
    """Of the matmuls; the static mask halves those of the activated layer."""
    h, m, r, w = model.hidden, model.intermediate, model.rank, model.relu2
    per_token = {
        "full": 6 * h * m,
        "swiglu": 6 * r * (h + m),
        "relu2": 4 * r * (h + w),
        "activations": 0,
    }[IMPLEMENTATIONS[name].weights]
    if name.endswith("2:4-static"):
        kept = w // 4 * 2 + min(w % 4, 2)
        per_token = 4 * r * (h + kept)
    return float(tokens * per_token)


def _is_shape(tree: Any) -> bool:
    return isinstance(tree, tuple) and bool(tree) and isinstance(tree[0], int)


def make_inputs(model: Model, tokens: int, kind: str, dtype: Any, seed: int) -> Any:
    """x ~ N(0, 1), weights ~ 0.02 N(0, 1); for a selection alone, only x."""
    width = model.relu2 if kind == "activations" else model.hidden
    x_key, *_ = keys = jax.random.split(jax.random.key(seed), 16)
    x = jax.random.normal(x_key, (tokens, width), dtype)
    shapes, tree = jax.tree.flatten(weight_shapes(model, kind), is_leaf=_is_shape)
    weights = [
        WEIGHT_SCALE * jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys[1 : len(shapes) + 1], shapes, strict=True)
    ]
    return x, *jax.tree.unflatten(tree, weights)


def build(
    name: str, model: Model, tokens: int, args: argparse.Namespace, framework: str
) -> Program:
    impl = IMPLEMENTATIONS[name]
    inputs = make_inputs(model, tokens, impl.weights, args.dtype, args.seed)
    fn = impl.plain if framework == PLAIN else impl.ours
    check = definitions.check_forward
    if args.backward:
        key = jax.random.key(args.seed + 1)
        shape = jax.eval_shape(fn, *inputs).shape
        inputs = (jax.random.normal(key, shape, args.dtype), *inputs)
        fn, check = with_gradients(fn), definitions.check_backward
    check = partial(check, impl.plain, inputs)
    if framework in _torch.FRAMEWORKS:
        module = TORCH_MODULES[name]
        return _torch.program(module, framework, inputs, check, args.backward)
    return Program(fn, inputs, check)


def _frameworks(name: str, args: argparse.Namespace) -> list[str]:
    """Ours, the same written plainly, and PyTorch's for what was published."""
    alone = IMPLEMENTATIONS[name].weights == "activations"
    if alone:
        return [] if args.backward else [OURS]
    torch = _torch.frameworks(args.peers) if name in TORCH_MODULES else ()
    return [OURS, *([PLAIN] if args.peers else []), *torch]


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The rows to measure, in order."""
    figures = _mlp_report.index_published(published("mlp"))
    default = GPU_CASES if args.on_device else CPU_CASES
    wanted = CASES if args.full else default
    if args.models or args.batches:
        models = args.models or list(dict.fromkeys(model for model, _ in wanted))
        batches = args.batches or sorted({str(batch) for _, batch in wanted}, key=int)
        wanted = [(model, int(batch)) for model in models for batch in batches]
    return [
        _make_case(model, batch, name, framework, figures, args)
        for model, batch in wanted
        for framework in (OURS, PLAIN, *_torch.FRAMEWORKS)
        for name in IMPLEMENTATIONS
        if framework in _frameworks(name, args)
    ]


def _make_case(label, batch, name, framework, figures, args) -> Case:
    model, impl, tokens = MODELS[label], IMPLEMENTATIONS[name], batch * SEQ
    passes = 3 if args.backward else 1
    published_ms = None
    if framework == OURS and not args.backward:
        published_ms = figures.get((label, batch, impl.published or name))
    return Case(
        labels={"model": label, "batch": batch, "tokens": tokens}
        | {"implementation": name, "framework": framework}
        | {"pass": "forward+backward" if args.backward else "forward"},
        build=partial(build, name, model, tokens, args, framework),
        flops=passes * count_flops(model, tokens, name),
        iterations=model.iterations if args.on_device else CPU_ITERATIONS,
        needed_bytes=_needed_bytes(model, tokens, impl.weights, args),
        published_ms=published_ms,
    )


def _needed_bytes(model: Model, tokens: int, kind: str, args) -> float:
    """The program's arguments, gradients and intermediates, and the float64 check's."""
    shapes = jax.tree.leaves(weight_shapes(model, kind), is_leaf=_is_shape)
    parameters = sum(a * b for a, b in shapes)
    copies = 2 if args.backward else 1
    in_dtype = parameters * args.dtype.itemsize + tokens * 4 * (
        2 * model.hidden + 4 * model.relu2
    )
    checked = min(tokens, definitions.CHUNK) * 6 * model.relu2 + parameters
    return copies * (in_dtype + 8 * checked)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("benchmarks.mlp", __doc__ or "")
    add = parser.add_argument
    valid = ", ".join(MODELS)
    add("--models", type=names(list(MODELS)), metavar="A,B", help=f"of {valid}")
    valid = ", ".join(map(str, BATCHES))
    add("--batches", type=names(BATCHES), metavar="A,B", help=f"of {valid} (x {SEQ})")
    add("--backward", action="store_true", help="forward and all gradients")
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="plain jnp, and PyTorch eager and compiled where it is installed",
    )
    args = parser.parse_args(argv)
    args.on_device = jax.default_backend() != "cpu"
    args.dtype = jnp.dtype(args.dtype or ("bfloat16" if args.on_device else "float32"))
    return args


def describe(labels) -> str:
    peer = "" if labels["framework"] == OURS else f"{labels['framework']} "
    return f"{labels['model']} {labels['batch']}x{SEQ} {peer}{labels['implementation']}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return list_or_run(args, make_cases(args), describe, _run)


def _run(args: argparse.Namespace, cases: list[Case], precision: str) -> int:
    options = Options(args.warmup, args.iterations, args.timing)
    peak = matmul_peak_tflops(args.dtype)
    calls = "calls as published" if args.on_device else f"{CPU_ITERATIONS} calls"
    meta = metadata(
        "mlp",
        dtype=str(args.dtype),
        matmul_precision=precision,
        seed=args.seed,
        matmul_peak_tflops=peak,
        timing_text=_mlp_report.timing_text(args, calls),
        notes=_mlp_report.notes(args.peers),
    )
    console = make_console()
    print_header(console, (__doc__ or "").splitlines()[0], meta)
    rows, status = execute(cases, options, meta, args.json, describe)
    _mlp_report.print_all(console, rows, describe)
    if args.plot:
        _mlp_report.plot(console, rows, args.plot, meta)
    if len(rows) < len(cases):
        console.print(f"Interrupted after {len(rows)} of {len(cases)} rows.")
    return status


if __name__ == "__main__":
    sys.exit(main())
