"""Do the forms of a per-sample weight mask agree, and what do they cost?

    python -m benchmarks.estimators         checks, then the published rows; on a CPU to
                                            8 samples
    python -m benchmarks.estimators --full  to 16 samples, on a CPU too
    python -m benchmarks.estimators --study bias and variance of the estimators

The published study (PyTorch, float32, on a GPU it does not name) trains masks of the
first MLP of a transformer, a mask a sample, and times forward (with the loss) and
backward (of the masks) apart: --warmup 3 --iterations 10 --timing per-call.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxkern._core import device
from jaxkern._masked.hopper.multiply import unsupported
from jaxkern._masked.masked import Method

from . import _estimators_definitions as definitions
from . import _estimators_model as model
from . import _estimators_plot as plots
from . import _estimators_report as report
from . import _estimators_study as study
from ._cli import add_only, make_parser, run_program
from ._estimators_report import PASSES, TITLES
from ._harness import (
    Case,
    Options,
    Program,
    Row,
    Skip,
    matmul_peak_tflops,
    with_gradients,
)
from ._report import execute, list_or_run, make_console, metadata, print_header

METHODS = (*get_args(Method), report.KERNEL)
BATCHES, CPU_BATCHES = (1, 2, 8, 16), (1, 2, 8)
WARMUP, CPU_WARMUP = 5, 1
ITERATIONS, CPU_ITERATIONS = 10, 3
# Of tokens and widths of the layer alone, to end within two minutes.
CPU_PART = 2
# Long calls on a CPU: of so many samples.
LONG, LONG_ITERATIONS = 8, 2


def _skip_unsupported(method: str, args: argparse.Namespace) -> None:
    """
    Raises:
        Skip: the row is of the kernels, and they cannot run here.
    """
    reason = device.unsupported() or unsupported(args.dtype, [jnp.float32])
    if method == report.KERNEL and reason:
        raise Skip(reason)


def build_layer(estimator: str, method, batch: int, args) -> Program:
    """Output and all gradients of `masked_bilinear`."""
    _skip_unsupported(method, args)
    key = args.seed, batch, args.layer_sizes, args.dtype
    inputs = definitions.layer_inputs(*key)

    def check(run):
        return definitions.expected_layer(estimator, *key).check(run(*inputs))

    def floors() -> Row:
        """In the kernels' dtypes, of an H200, and what is predicted of the kernels."""
        which = args.layer_sizes, batch, "all gradients"
        predicted = {"predicted_us": model.predicted_us(*which, estimator)}
        return {"floors_us": model.floors_us(*which)} | (
            predicted if method == report.KERNEL else {}
        )

    run = with_gradients(definitions.layer(estimator, method))
    return Program(run, inputs, check, figures=floors, warmed=1)


def build_model(estimator: str, method, batch: int, which: str, args) -> Program:
    _skip_unsupported(method, args)
    key = estimator, method, batch, args.seed, args.dtype
    passes = definitions.make_passes(*key)
    expected = estimator, which, args.seed, batch, max(args.batches), args.dtype
    if which == "forward":
        check = partial(definitions.check_forward, passes, expected)
        return Program(passes.forward, passes.args, check, warmed=1)
    passes.run_forward()
    kept, passes.kept = passes.kept, None
    inputs = kept, *passes.args
    check = partial(definitions.check_backward, inputs, batch, expected)
    size = sum(x.nbytes for x in jax.tree.leaves(kept))
    figures = partial(dict, kept_bytes=size)
    return Program(passes.backward, inputs, check, figures=figures, warmed=1)


def _iterations(batch: int, args: argparse.Namespace) -> int:
    if args.whole:
        return ITERATIONS
    return LONG_ITERATIONS if batch >= LONG else CPU_ITERATIONS


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The rows to measure, in order."""
    cases = [
        Case(
            {"part": "layer", "estimator": estimator, "batch": batch}
            | {"implementation": method, "pass": "forward+backward"},
            partial(build_layer, estimator, method, batch, args),
            iterations=_iterations(batch, args),
            # Of the float64 check.
            needed_bytes=2**20 * (300 + 400 * batch),
        )
        for batch in args.batches
        for estimator in definitions.ESTIMATORS
        for method in METHODS
    ]
    cases += [
        Case(
            {"part": "model", "estimator": estimator, "batch": batch}
            | {"implementation": method, "pass": which},
            partial(build_model, estimator, method, batch, which, args),
            iterations=_iterations(batch, args),
            needed_bytes=2**20 * (1000 + 250 * max(args.batches)),
            published_ms=report.published_ms(estimator, method, batch, which),
        )
        for estimator in TITLES
        for batch in args.batches
        for method in ("current", *METHODS)
        if method != "current" or batch == 1
        for which in PASSES
    ]
    return [c for c in cases if re.search(args.only, describe(c.labels))]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("benchmarks.estimators", __doc__ or "", warmup=None)
    help_study = "of the estimators' gradients against the exact ones; no times"
    parser.add_argument("--study", action="store_true", help=help_study)
    add_only(parser)
    args = parser.parse_args(argv)
    args.on_device = jax.default_backend() != "cpu"
    whole = args.on_device or args.full
    args.batches = BATCHES if whole else CPU_BATCHES
    part = 1 if whole else CPU_PART
    sizes = definitions.SEQ, definitions.EMBED, definitions.HIDDEN
    args.layer_sizes = tuple(size // part for size in sizes)
    args.whole = whole
    args.dtype = jnp.dtype(args.dtype or ("bfloat16" if args.on_device else "float32"))
    if args.warmup is None:
        args.warmup = WARMUP if args.on_device else CPU_WARMUP
    if args.study:
        if args.only or args.full or args.list:
            parser.error("--study has no rows to choose from: leave out --only, --full")
        return args
    if not make_cases(args):
        parser.error(f"--only must be found in a row of --list, got {args.only!r}")
    return args


def describe(labels: Mapping[str, Any]) -> str:
    names = ("part", "estimator", "batch", "implementation", "pass")
    return " ".join(str(labels[name]) for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.study:
        return study.main(args)
    return list_or_run(args, make_cases(args), describe, _run)


def _run(args: argparse.Namespace, cases: list[Case], precision: str) -> int:
    default = ITERATIONS if args.whole else f"{CPU_ITERATIONS} (long ones 2)"
    calls = f"{args.iterations or default} calls"
    warmups = f"{args.warmup} warm-ups"
    if args.warmup == 1:
        warmups = "1 warm-up, the check's"
    meta = metadata(
        "estimators",
        dtype=str(args.dtype),
        matmul_precision=precision,
        seed=args.seed,
        matmul_peak_tflops=matmul_peak_tflops(args.dtype),
        timing_text=f"{args.timing}, {calls} after {warmups}",
        notes=report.notes(args),
    )
    console = make_console()
    print_header(console, (__doc__ or "").splitlines()[0], meta)
    options = Options(args.warmup, args.iterations, args.timing)
    rows, status = execute(cases, options, meta, args.json, describe)
    report.print_all(console, rows, describe, args)
    if args.plot:
        plots.plot(console, rows, args.plot, meta)
    if len(rows) < len(cases):
        console.print(f"Interrupted after {len(rows)} of {len(cases)} rows.")
    return status


if __name__ == "__main__":
    run_program(main)
