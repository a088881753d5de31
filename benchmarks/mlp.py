"""Are low-rank and 2:4-sparse MLPs faster than the full-rank SwiGLU, and right?

    python -m benchmarks.mlp            60M, 130M, 350M at 1 x 512 tokens;
                                        on a GPU every model at 1 and 32 x 512
    python -m benchmarks.mlp --full     8 models x 5 batches x every variant
    python -m benchmarks.mlp --stages   of the low-rank ReLU² MLP, each stage apart
    python -m benchmarks.mlp --predict  what our kernels are to take on an H200

The published study (PyTorch, RTX 3090, bfloat16) compares the four first variants; its
2:4 is the static mask. Beyond it: 2:4 chosen per token, weights pruned to 2:4, and the
selection alone. Predicted is never measured: it follows from shapes and a data sheet.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from . import _mlp_break_even as break_even
from . import _mlp_definitions as definitions
from . import _mlp_model as shapes
from . import _mlp_predictions as predictions
from . import _mlp_programs as programs
from . import _mlp_report as report
from . import _mlp_stages as stages
from . import _mlp_stages_report as stages_report
from . import _torch
from ._cli import add_only, make_parser, names, plot_file, run_program
from ._harness import Case, Options, matmul_peak_tflops
from ._mlp_model import BATCHES, BOTH, FORWARD, MODELS, Model
from ._mlp_peers import PLAIN, TOKAMAX, TORCH_SPARSE
from ._mlp_programs import IMPLEMENTATIONS, KERNEL, OURS
from ._report import (
    execute,
    list_or_run,
    make_console,
    metadata,
    print_header,
    published,
)

CPU_ITERATIONS = 40
CASES = [(model, batch) for model in MODELS for batch in BATCHES]
CPU_CASES = [(model, 1) for model in ("60M", "130M", "350M")]
GPU_CASES = [(model, batch) for model in MODELS for batch in (1, 32)]
FRAMEWORKS = OURS, KERNEL, PLAIN, TOKAMAX, *_torch.FRAMEWORKS, TORCH_SPARSE


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The rows to measure, in order."""
    figures = report.index_published(published("mlp"))
    default = GPU_CASES if args.on_device else CPU_CASES
    wanted = CASES if args.full else default
    if args.models or args.batches:
        models = args.models or list(dict.fromkeys(model for model, _ in wanted))
        batches = args.batches or sorted({str(batch) for _, batch in wanted}, key=int)
        wanted = [(model, int(batch)) for model in models for batch in batches]
    if args.stages:
        cases = [
            case
            for model, batch in wanted
            for case in _make_stages(model, batch, figures, args)
        ]
    else:
        cases = [
            _make_case(model, batch, name, framework, figures, args)
            for model, batch in wanted
            for framework in FRAMEWORKS
            for name in IMPLEMENTATIONS
            if framework in programs.frameworks(name, args)
        ]
    return [c for c in cases if re.search(args.only, describe(c.labels))]


def _labels(label: str, batch: int, name: str, framework: str, backward: bool) -> dict:
    return {
        "model": label,
        "batch": batch,
        "tokens": batch * shapes.SEQ,
        "implementation": name,
        "framework": framework,
        "pass": BOTH if backward else FORWARD,
    }


def _make_case(label, batch, name, framework, figures, args) -> Case:
    model, impl = shapes.MODELS[label], IMPLEMENTATIONS[name]
    tokens = batch * shapes.SEQ
    published_ms = None
    if framework == OURS and not args.backward:
        published_ms = figures.get((label, batch, impl.published or name))
    return Case(
        labels=_labels(label, batch, name, framework, args.backward),
        build=partial(programs.build, name, model, tokens, args, framework),
        flops=(3 if args.backward else 1) * shapes.count_flops(model, tokens, name),
        iterations=model.iterations if args.on_device else CPU_ITERATIONS,
        needed_bytes=_needed_bytes(model, tokens, impl.weights, args),
        published_ms=published_ms,
    )


def _make_stages(label, batch, figures, args) -> list[Case]:
    """All stages, and the op that they add up to."""
    model, tokens = shapes.MODELS[label], batch * shapes.SEQ
    cases = [
        Case(
            labels=_labels(label, batch, name, framework, False) | {"part": "stage"},
            build=partial(stages.build, name, model, tokens, args),
            flops=2 * stages.count_macs(model, tokens, name),
            iterations=model.iterations if args.on_device else CPU_ITERATIONS,
            needed_bytes=_needed_bytes(model, tokens, "relu2", args),
        )
        for framework, group in stages.BY_FRAMEWORK.items()
        for name in group
    ]
    whole = [
        _make_case(label, batch, name, framework, figures, args)
        for framework, name in stages.WHOLE.values()
    ]
    return cases + [replace(c, labels={**c.labels, "part": "whole"}) for c in whole]


def _needed_bytes(model: Model, tokens: int, kind: str, args) -> float:
    """The program's arguments, gradients and intermediates, and the float64 check's."""
    sizes = programs.weight_shapes(model, kind)
    sizes = jax.tree.leaves(sizes, is_leaf=programs.is_shape)
    parameters = sum(a * b for a, b in sizes)
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
    help_batches = f"of {valid} (x {shapes.SEQ})"
    add("--batches", type=names(BATCHES), metavar="A,B", help=help_batches)
    add("--backward", action="store_true", help="forward and all gradients")
    add("--stages", action="store_true", help="of low-rank ReLU², each apart; forward")
    help_predict = "print what is predicted for one H200, and measure nothing"
    add("--predict", action="store_true", help=help_predict)
    add(
        "--break-even",
        type=plot_file,
        metavar="FILE",
        help="draw what 2:4 gains, by rank: predicted, and nothing is measured; after "
        "--stages on a GPU what these measured",
    )
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="plain jnp; PyTorch and tokamax where they are installed",
    )
    add_only(parser)
    args = parser.parse_args(argv)
    _refuse(parser, args)
    args.on_device = jax.default_backend() != "cpu"
    args.dtype = jnp.dtype(args.dtype or ("bfloat16" if args.on_device else "float32"))
    if not _predicts(args) and not make_cases(args):
        parser.error(f"--only must be found in a row of --list, got {args.only!r}")
    return args


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.stages and (args.backward or args.plot):
        parser.error("--stages is of the forward, and --break-even draws it")
    chosen = args.models or args.batches or args.only or args.list
    other = args.stages or args.backward or args.plot
    if _predicts(args) and (chosen or other):
        parser.error(
            "--predict is of all rows, stages and passes, as is --break-even without "
            "--stages: these go with --json and each other only"
        )


def _predicts(args: argparse.Namespace) -> bool:
    """Whether nothing is measured."""
    return args.predict or (args.break_even is not None and not args.stages)


def describe(labels) -> str:
    peer = "" if labels["framework"] == OURS else f"{labels['framework']} "
    stage = "stage " if labels.get("part") == "stage" else ""
    size = f"{labels['model']} {labels['batch']}x{shapes.SEQ}"
    return f"{size} {peer}{stage}{labels['implementation']}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if _predicts(args):
        return predictions.main(args)
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
        timing_text=report.timing_text(args, calls),
        notes=report.notes(args),
    )
    console = make_console()
    print_header(console, (__doc__ or "").splitlines()[0], meta)
    rows, status = execute(cases, options, meta, args.json, describe)
    if args.stages:
        stages_report.print_all(console, rows, describe)
    else:
        report.print_all(console, rows, describe)
    if args.break_even:
        points = break_even.measured(rows)
        break_even.plot(console, args.break_even, points, meta, is_measured=True)
    if args.plot:
        report.plot(console, rows, args.plot, meta)
    if len(rows) < len(cases):
        console.print(f"Interrupted after {len(rows)} of {len(cases)} rows.")
    return status


if __name__ == "__main__":
    run_program(main)
