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
import numpy as np

import jaxkern

from . import _mlp_report, _mlp_torch
from ._cli import make_parser, names
from ._harness import (
    Case,
    Check,
    Options,
    Program,
    check_against,
    matmul_peak_tflops,
)
from ._report import execute, make_console, metadata, print_header, published

SEQ = 512
BATCHES = (1, 4, 8, 16, 32)
WEIGHT_SCALE = 0.02
# Rows of the result that are compared with the float64 definition.
CHECKED_TOKENS = 64
CPU_ITERATIONS = 40


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


def _plain_swiglu(x, w_gate, w_up, w_down):
    return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down


def _plain_low_rank_swiglu(x, gate, up, down):
    hidden = jax.nn.silu((x @ gate[0]) @ gate[1]) * ((x @ up[0]) @ up[1])
    return (hidden @ down[0]) @ down[1]


def _plain_relu2(select, x, up, down):
    hidden = select(jax.nn.relu((x @ up[0]) @ up[1]) ** 2)
    return (hidden @ down[0]) @ down[1]


def _sorted_groups(a):
    groups = jnp.pad(a, ((0, 0), (0, -a.shape[1] % 4))).reshape(len(a), -1, 4)
    return groups, jnp.argsort(jnp.argsort(-abs(groups), stable=True), stable=True)


def _plain_static(a):
    return a * (jnp.arange(a.shape[1]) % 4 < 2)


def _plain_top2(a):
    _, rank = _sorted_groups(a)
    return a * (rank < 2).reshape(len(a), -1)[:, : a.shape[1]]


def _plain_soft(a):
    groups, _ = _sorted_groups(a)
    threshold = jnp.sort(abs(groups), axis=-1)[..., 1:2]
    shrunk = jnp.sign(groups) * jnp.maximum(abs(groups) - threshold, 0)
    # In float16 the squares of small activations would be zeros.
    shrunk = shrunk.reshape(len(a), -1)[:, : a.shape[1]]
    s = shrunk.astype(jnp.promote_types(a.dtype, jnp.float32))
    scale = (a * s).sum(1, keepdims=True) / (s * s).sum(1, keepdims=True)
    return a + jax.lax.stop_gradient((scale * s).astype(a.dtype) - a)


@dataclass(frozen=True)
class Implementation:
    """Ours, the definition it is checked against, and the published row it answers."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    weights: str
    published: str | None = None


def _relu2(sparsity, select, published=None):
    ours = partial(jaxkern.low_rank_relu2, sparsity=sparsity)
    return Implementation(ours, partial(_plain_relu2, select), "relu2", published)


def _select(method, plain):
    ours = partial(jaxkern.sparsify_2_4, method=method)
    return Implementation(ours, plain, "activations")


IMPLEMENTATIONS = {
    "swiglu": Implementation(jaxkern.swiglu, _plain_swiglu, "full", "swiglu"),
    "low_rank_swiglu": Implementation(
        jaxkern.low_rank_swiglu, _plain_low_rank_swiglu, "swiglu", "low_rank_swiglu"
    ),
    "low_rank_relu2": _relu2(None, lambda a: a, "low_rank_relu2"),
    "low_rank_relu2 2:4-static": _relu2(
        "2:4-static", _plain_static, "low_rank_relu2_2to4"
    ),
    "low_rank_relu2 2:4": _relu2("2:4", _plain_top2),
    "low_rank_relu2 2:4-soft": _relu2("2:4-soft", _plain_soft),
    "static mask alone": _select("static", _plain_static),
    "2:4 alone": _select("top2", _plain_top2),
    "2:4-soft alone": _select("soft", _plain_soft),
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


def with_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """From the arguments and the result's cotangent to result and all gradients."""

    def forward_and_backward(cotangent, *args):
        value, vjp = jax.vjp(fn, *args)
        return value, vjp(cotangent)

    return forward_and_backward


def _spread(tokens: int) -> np.ndarray:
    count = min(CHECKED_TOKENS, tokens)
    return np.unique(np.linspace(0, tokens - 1, count).astype(int))


def _definition(fn: Callable[..., Any], args: Any) -> tuple[Any, Any]:
    """What `fn` gives in the dtype of the arguments, and in float64."""
    plain = jax.jit(fn)(*args)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), args)
        exact = jax.tree.map(np.asarray, jax.jit(fn)(*wide))
    return plain, exact


def check_forward(impl: Implementation, args: Any, fn: Callable[..., Any]) -> Check:
    """Compare some tokens of the program's own result."""
    x, *weights = args
    rows = _spread(len(x))
    plain, exact = _definition(impl.plain, (x[rows], *weights))
    return check_against(fn(*args)[rows], plain, exact, x.dtype)


def check_backward(impl: Implementation, args: Any, fn: Callable[..., Any]) -> Check:
    """As forward; with no cotangent elsewhere, weight gradients are of these tokens."""
    cotangent, x, *weights = args
    rows = _spread(len(x))
    some = jnp.zeros_like(cotangent).at[rows].set(cotangent[rows])
    value, (d_x, *d_weights) = fn(some, x, *weights)
    got = value[rows], (d_x[rows], *d_weights)
    few = (cotangent[rows], x[rows], *weights)
    plain, exact = _definition(with_gradients(impl.plain), few)
    return check_against(got, plain, exact, x.dtype)


def build(
    name: str, model: Model, tokens: int, args: argparse.Namespace, framework: str
) -> Program:
    impl = IMPLEMENTATIONS[name]
    inputs = make_inputs(model, tokens, impl.weights, args.dtype, args.seed)
    check, ours = check_forward, impl.ours
    if args.backward:
        key = jax.random.key(args.seed + 1)
        shape = jax.eval_shape(impl.ours, *inputs).shape
        inputs = (jax.random.normal(key, shape, args.dtype), *inputs)
        check, ours = check_backward, with_gradients(impl.ours)
    if framework != "jaxkern":
        return _mlp_torch.program(
            name, framework, inputs, partial(check, impl, inputs), args.backward
        )
    return Program(ours, inputs, partial(check, impl, inputs))


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The rows to measure, in order."""
    figures = _mlp_report.index_published(published("mlp"))
    default = GPU_CASES if args.on_device else CPU_CASES
    wanted = CASES if args.full else default
    if args.models or args.batches:
        models = args.models or list(dict.fromkeys(model for model, _ in wanted))
        batches = args.batches or sorted({str(batch) for _, batch in wanted}, key=int)
        wanted = [(model, int(batch)) for model in models for batch in batches]
    cases = []
    for label, batch in wanted:
        for framework in ("jaxkern", *_mlp_torch.frameworks(args.peers)):
            for name, impl in IMPLEMENTATIONS.items():
                if framework != "jaxkern" and name not in _mlp_torch.MODULES:
                    continue
                if args.backward and impl.weights == "activations":
                    continue
                cases.append(_make_case(label, batch, name, framework, figures, args))
    return cases


def _make_case(label, batch, name, framework, figures, args) -> Case:
    model, impl, tokens = MODELS[label], IMPLEMENTATIONS[name], batch * SEQ
    flops = count_flops(model, tokens, name)
    shapes = jax.tree.leaves(weight_shapes(model, impl.weights), is_leaf=_is_shape)
    parameters = sum(a * b for a, b in shapes)
    activations = tokens * (2 * model.hidden + 4 * model.relu2)
    # Gradients as large as the arguments, and float32 copies at worst.
    passes = 3 if args.backward else 1
    itemsize = jnp.dtype(args.dtype).itemsize
    published_ms = None
    if framework == "jaxkern" and not args.backward:
        published_ms = figures.get((label, batch, impl.published or name))
    return Case(
        labels={"model": label, "batch": batch, "tokens": tokens}
        | {"implementation": name, "framework": framework}
        | {"pass": "forward+backward" if args.backward else "forward"},
        build=partial(build, name, model, tokens, args, framework),
        flops=passes * flops,
        iterations=model.iterations if args.on_device else CPU_ITERATIONS,
        needed_bytes=passes * (parameters * itemsize + activations * 4),
        published_ms=published_ms,
    )


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
        help="PyTorch eager and compiled beside ours, where it is installed",
    )
    args = parser.parse_args(argv)
    args.on_device = jax.default_backend() != "cpu"
    args.dtype = jnp.dtype(args.dtype or ("bfloat16" if args.on_device else "float32"))
    return args


def describe(labels) -> str:
    peer = "" if labels["framework"] == "jaxkern" else f"{labels['framework']} "
    return f"{labels['model']} {labels['batch']}x{SEQ} {peer}{labels['implementation']}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    cases = make_cases(args)
    if args.list:
        print("\n".join(describe(case.labels) for case in cases))
        return 0
    # On a GPU float32 would silently be tf32.
    precision = "highest" if args.dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        return _run(args, cases, precision)


def _run(args: argparse.Namespace, cases: list[Case], precision: str) -> int:
    options = Options(args.warmup, args.iterations, args.timing)
    peak = matmul_peak_tflops()
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
    rows, complete = execute(cases, options, meta, args.json, describe)
    _mlp_report.print_all(console, rows, describe)
    if args.plot:
        _mlp_report.plot(rows, args.plot, meta)
    if not complete:
        console.print(f"Interrupted after {len(rows)} of {len(cases)} rows.")
        return 130
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
