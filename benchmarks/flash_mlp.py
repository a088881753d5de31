"""Is the multi-head MLP right, how fast is it, and how much memory does it take?

    python -m benchmarks.flash_mlp          the five published configurations; on a CPU
                                            with an 8th of their tokens
    python -m benchmarks.flash_mlp --full   all of them, on a CPU too
    python -m benchmarks.flash_mlp --sweep  JAX's rows over 6 dims x 5 hidden sizes

The published study (FlashMLP: PyTorch eager and its Triton kernel, bfloat16, on a GPU
it does not name) times forward, and forward and backward, and measures the memory they
allocate over that of weights and input. Floors are for one H200, from its data sheet.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxkern
from jaxkern._core import device
from jaxkern._mlp.hopper import flash
from jaxkern.testing import plain

from . import _flash_mlp_definitions as definitions
from . import _flash_mlp_model as model
from . import _flash_mlp_plot as plots
from . import _flash_mlp_report as report
from . import _torch
from ._cli import add_only, make_parser, run_program
from ._flash_mlp_model import PASSES, Shape
from ._harness import Case, Options, Program, Skip, matmul_peak_tflops, with_gradients
from ._report import execute, list_or_run, make_console, metadata, print_header

ITERATIONS = 100
CPU_ITERATIONS = 10
# A CPU's default takes that part of the published tokens, to end within two minutes.
CPU_PART = 8
DIMS = (32, 64, 96, 128, 192, 256)
HIDDEN = (512, 1024, 2048, 4096, 8192)
SWEEP = [Shape(16, 2048, dim, hidden) for dim in DIMS for hidden in HIDDEN]
CPU_SWEEP = [Shape(2, 256, s.dim, s.hidden) for s in SWEEP if s.hidden <= 2048]

OURS = ("mosaic_gpu", "xla")
JAX = (*OURS, "naive jnp", "plain jnp")
PEER = "peer"


def build(implementation: str, shape: Shape, which: str, args) -> Program:
    backward = which == "forward+backward"
    key = shape, args.dtype, args.seed, backward
    inputs = definitions.arguments(*key)
    check = partial(definitions.check, key, inputs)
    if implementation == "mosaic_gpu":
        x, w1, _ = inputs[-3:]
        reason = device.unsupported() or flash.unsupported(x, w1)
        if reason:
            raise Skip(reason)
    if implementation == "naive jnp":
        return definitions.naive(inputs, check, backward)
    if implementation not in JAX:
        module = definitions.torch_module
        if implementation == PEER:
            module = _without_namespace(_torch.load(args.peer))
        return _torch.program(module, implementation, inputs, check, backward)
    fn: Any = plain.flash_mlp
    if implementation in OURS:
        fn = partial(jaxkern.flash_mlp, implementation=implementation)
    if backward:
        return Program(with_gradients(fn), inputs, check)
    # The sweep does not print memory, and this compiles once more.
    figures = dict if args.sweep else partial(definitions.recorded, fn, inputs)
    return Program(fn, inputs, check, figures=figures)


def _without_namespace(function):
    return lambda F, *args: function(*args)


def _implementations(args: argparse.Namespace) -> tuple[str, ...]:
    if args.sweep:
        return JAX
    return *JAX, *_torch.frameworks(args.peers), *([PEER] if args.peer else [])


def _shapes(args: argparse.Namespace) -> list[Shape]:
    whole = args.on_device or args.full
    if args.sweep:
        return SWEEP if whole else CPU_SWEEP
    part = 1 if whole else CPU_PART
    return [replace(s, batch=s.batch // part) for s in model.PUBLISHED]


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The rows to measure, in order."""
    cases = [
        _make_case(shape, which, implementation, args)
        for shape in _shapes(args)
        for which in PASSES
        for implementation in _implementations(args)
    ]
    return [c for c in cases if re.search(args.only, describe(c.labels))]


def _make_case(
    shape: Shape, which: str, implementation: str, args: argparse.Namespace
) -> Case:
    flops = model.count_flops(shape, which)
    line = model.PUBLISHED.get(shape) if args.compared else None
    return Case(
        labels={"shape": str(shape), "pass": which, "implementation": implementation}
        | vars(shape),
        build=partial(build, implementation, shape, which, args),
        flops=flops,
        iterations=ITERATIONS if args.on_device else CPU_ITERATIONS,
        # Of the float64 check, which is the largest part.
        needed_bytes=8 * flops / shape.dim,
        published_ms=report.published_ms(line, which, "fused"),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("benchmarks.flash_mlp", __doc__ or "", full=False)
    add = parser.add_argument
    add("--full", action="store_true", help="the whole sizes, on a CPU too")
    add("--sweep", action="store_true", help="30 sizes beside the published ones")
    add_only(parser)
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="PyTorch eager and compiled, where it is installed",
    )
    add(
        "--peer",
        type=_torch.peer("flash_mlp"),
        metavar="PATH.py[:NAME]",
        help="one more row: a function (default flash_mlp) of the torch tensors x, w1 "
        "and w2, (heads, batch, dim) and so on, that returns y",
    )
    args = parser.parse_args(argv)
    if args.sweep and args.peer:
        parser.error("--sweep has JAX's rows only: leave out --peer")
    args.on_device = jax.default_backend() != "cpu"
    args.dtype = jnp.dtype(args.dtype or ("bfloat16" if args.on_device else "float32"))
    # Next to the published figures, since the sizes are theirs.
    args.compared = (args.on_device or args.full) and not args.sweep
    if not make_cases(args):
        parser.error(f"--only must be found in a row of --list, got {args.only!r}")
    return args


def describe(labels: Mapping[str, Any]) -> str:
    return f"{labels['shape']} {labels['pass']} {labels['implementation']}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return list_or_run(args, make_cases(args), describe, _run)


def _run(args: argparse.Namespace, cases: list[Case], precision: str) -> int:
    calls = args.iterations or (ITERATIONS if args.on_device else CPU_ITERATIONS)
    meta = metadata(
        "flash_mlp",
        dtype=str(args.dtype),
        matmul_precision=precision,
        seed=args.seed,
        matmul_peak_tflops=matmul_peak_tflops(args.dtype),
        timing_text=f"{args.timing}, {calls} calls after {args.warmup} warm-ups",
        notes=report.notes(args, CPU_PART),
    )
    console = make_console()
    print_header(console, (__doc__ or "").splitlines()[0], meta)
    options = Options(args.warmup, args.iterations, args.timing)
    rows, status = execute(cases, options, meta, args.json, describe)
    report.print_all(console, rows, describe, args)
    if args.plot and args.sweep:
        plots.plot_sweep(console, rows, args.plot, meta)
    elif args.plot:
        plots.plot(console, rows, args.plot, meta, args.compared)
    if len(rows) < len(cases):
        console.print(f"Interrupted after {len(rows)} of {len(cases)} rows.")
    return status


if __name__ == "__main__":
    run_program(main)
