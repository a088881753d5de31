"""How fast are the language model's loss and its gradients, and with what warm-up?

    python -m benchmarks.transformer          small at 4 x 128 tokens; on a GPU all five
                                              sizes
    python -m benchmarks.transformer --full   the 60 published rows: 5 sizes x contexts
                                              128, 256 x warm-ups 0, 1, 5 x 2 passes
    python -m benchmarks.transformer --optimizer --dtype bfloat16 --trace DIR
    python -m benchmarks.transformer --mesh fsdp=4,tensor=2    on so many devices
    python -m benchmarks.transformer --memory                  for 8 to 512, on paper

The published study (PyTorch eager, float32, a GPU it does not name) times the loss, and
the loss with all gradients; 10 trials, each waited for. Beside it: the same model in
plain jnp, a full AdamW step, and other attention and MLPs.
"""

import argparse
import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxkern.nn import make_mesh, parse_mesh_sizes

from . import _transformer_memory as memory
from . import _transformer_report as report
from ._cli import DTYPES, add_only, make_parser, names, positive, run_program
from ._harness import Case, Options, matmul_peak_tflops
from ._report import (
    execute,
    list_or_run,
    make_console,
    metadata,
    print_header,
    published,
)
from ._transformer_programs import (
    ATTENTION,
    MLP,
    PLAIN,
    Layers,
    Pass,
    Size,
    Task,
    build,
)

OURS = "jaxkern"
SIZES = {
    "small": Size(768, 3072, 12, 12),
    "medium": Size(1024, 4096, 24, 16),
    "large": Size(1280, 5120, 36, 20),
    "xl": Size(1600, 6400, 48, 25),
    "2.7B": Size(2560, 10240, 32, 32),
}
CONTEXTS, MORE_CONTEXTS = (128, 256), (128, 256, 512, 1024, 2048)
WARMUPS, DEFAULT_WARMUPS = (0, 1, 5), (0, 1)
TRIALS, CPU_TRIALS = 10, 4
BATCH = 4
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
# A matmul of so many rows and columns takes a fifth of a second on two cores.
CPU_PEAK_SIZE, CPU_PEAK_CALLS = 2048, 5


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The rows to measure, in order: those of one model's weights together."""
    default = SIZES if args.full or args.on_device else ["small"]
    contexts = args.contexts or (CONTEXTS if args.full else CONTEXTS[:1])
    passes = [*PASSES, *(["optimizer step"] if args.optimizer else [])]
    cases = []
    for size in args.sizes or default:
        for by, layers in _implementations(args):
            # What is not published stands beside ours once, not with every warm-up.
            warmups = args.warmup if by == OURS else [max(args.warmup)]
            cases += [
                _make_case(size, int(context), what, int(warmup), by, layers, args)
                for context in contexts
                for what in passes
                for warmup in warmups
            ]
    return [c for c in cases if re.search(args.only, describe(c.labels))]


def _implementations(args: argparse.Namespace) -> list[tuple[str, Layers]]:
    """Ours, and where peers are wanted those; a CPU has time for plain jnp only."""
    other: Layers = "unrolled" if args.layers == "scanned" else "scanned"
    rows: list[tuple[str, Layers]] = [(OURS, args.layers)]
    if args.peers and (args.full or args.on_device):
        rows.append((f"{OURS} {other}", other))
    dense = (args.attention, args.mlp) == ("dense", "swiglu")
    if args.peers and dense and args.mesh is None:
        rows.append((PLAIN, "unrolled"))
    return rows


def _make_case(name, context, what, warmup, by, layers, args) -> Case:
    task = Task(
        size=SIZES[name],
        context=context,
        batch=args.batch,
        what=what,
        attention=args.attention,
        mlp=args.mlp,
        dtype=str(args.dtype),
        remat=args.remat,
        seed=args.seed,
        mesh=args.mesh,
    )
    # The devices that a CPU pretends to be share its cores, and the rate beside them.
    devices = jax.device_count() if args.mesh and args.on_device else 1
    labels = {"size": name, "context": context, "batch": args.batch, "pass": what}
    labels |= {"warmup": warmup, "framework": by, "layers": layers}
    line = report.find_published(published("transformer"), labels)
    trace = args.trace and args.trace / re.sub(r"\W+", "-", describe(labels))
    return Case(
        labels=labels,
        build=partial(build, task, PLAIN if by == PLAIN else OURS, layers, trace),
        flops=task.flops() / devices,
        iterations=TRIALS if args.full or args.on_device else CPU_TRIALS,
        needed_bytes=task.needed_bytes(),
        published_ms=None if line is None else float(line["mean_time_ms"]),
        warmup=warmup,
    )


def describe(labels: Mapping[str, Any]) -> str:
    warmup = f"warm-up {labels['warmup']}"
    by = "" if labels["framework"] == OURS else f" {labels['framework']}"
    return f"{labels['size']} {labels['context']} {labels['pass']} {warmup}{by}"


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    exists = next(p for p in (path, *path.parents) if p.exists())
    if not exists.is_dir() or not os.access(exists, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"must be a folder to write to, got {text!r}: {exists} is none"
        )
    return path


def _warmups(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be integers like 0,1,5, got {text!r}")
    return sorted({int(part) for part in parts})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # Rows differ in their warm-ups. As published: float32, each call waited for.
    own = "--warmup", "--timing", "--dtype"
    parser = make_parser("benchmarks.transformer", __doc__ or "", plot=False, own=own)
    add = parser.add_argument
    help_warmup = "calls before the clock starts, row by row (default 0,1; full 0,1,5)"
    add("--warmup", type=_warmups, metavar="N,N", help=help_warmup)
    timings = "per-call", "amortised"
    help_timing = "wait for the device each call (default), or once a stretch of calls"
    add("--timing", choices=timings, default="per-call", help=help_timing)
    help_dtype = "of the computation (default float32, as published)"
    add("--dtype", choices=DTYPES, default="float32", help=help_dtype)
    add("--sizes", type=names([*SIZES]), metavar="A,B", help=f"of {', '.join(SIZES)}")
    valid = ", ".join(map(str, MORE_CONTEXTS))
    add("--contexts", type=names(MORE_CONTEXTS), metavar="A,B", help=f"of {valid}")
    add("--batch", type=positive, default=BATCH, metavar="N", help=f"default {BATCH}")
    add("--optimizer", action="store_true", help="a full step with AdamW too")
    add("--attention", choices=[*ATTENTION], default="dense", help="default: dense")
    add("--mlp", choices=[*MLP], default="swiglu", help="default: swiglu")
    help_layers = "how our layers run (default: unrolled on a CPU, else scanned)"
    add("--layers", choices=("scanned", "unrolled"), help=help_layers)
    add("--remat", action="store_true", help="compute layers again in the backward")
    help_trace = "save a profile of each row there (jax.profiler)"
    add("--trace", type=_folder, metavar="DIR", help=help_trace)
    help_mesh = "axes data, fsdp, context, tensor; their product is the device count"
    add("--mesh", metavar="AXIS=SIZE,...", help=help_mesh)
    help_memory = "bytes a device for a training step, compiled and not run; alone"
    add("--memory", action="store_true", help=help_memory)
    add_only(parser)
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="plain jnp; on a GPU or with --full ours, layers run the other way, too",
    )
    args = parser.parse_args(argv)
    if args.memory:
        if args != parser.parse_args(["--memory"]):
            parser.error("--memory must be the only option")
        return args
    args.on_device = jax.default_backend() != "cpu"
    if args.warmup is None:
        args.warmup = [*(WARMUPS if args.full else DEFAULT_WARMUPS)]
    args.layers = args.layers or ("scanned" if args.on_device else "unrolled")
    args.dtype = jnp.dtype(args.dtype)
    if args.mesh is not None:
        _check_mesh(parser, args)
    if not make_cases(args):
        parser.error(f"--only must be found in a row of --list, got {args.only!r}")
    return args


def _check_mesh(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What it cannot share is refused before anything is computed."""
    try:
        make_mesh(**parse_mesh_sizes(args.mesh))
        for case in make_cases(args):
            row: Any = case.build
            row.args[0].trace(args.layers)
    except ValueError as error:
        parser.error(f"--mesh: {error}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.memory:
        return memory.main()
    return list_or_run(args, make_cases(args), describe, _run)


def _cpu_peak_tflops(dtype: Any) -> float:
    """Rate of a large matmul, in this run: the best of a few calls."""
    a = jax.random.normal(jax.random.key(0), (CPU_PEAK_SIZE, CPU_PEAK_SIZE), dtype)
    run = jax.jit(jnp.matmul).lower(a, a).compile()
    run(a, a).block_until_ready()
    times = []
    for _ in range(CPU_PEAK_CALLS):
        start = time.perf_counter()
        run(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * CPU_PEAK_SIZE**3 / min(times) / 1e12


def _run(args: argparse.Namespace, cases: list[Case], precision: str) -> int:
    peak = matmul_peak_tflops(args.dtype) or _cpu_peak_tflops(args.dtype)
    meta = metadata(
        "transformer",
        dtype=str(args.dtype),
        matmul_precision=precision,
        seed=args.seed,
        matmul_peak_tflops=peak,
        timing_text=report.timing_text(args, cases[0].iterations),
        notes=report.notes(args, peak),
    )
    console = make_console()
    question = (__doc__ or "").splitlines()[0]
    print_header(console, question, meta | {"matmul_peak_tflops": None})
    options = Options(0, args.iterations, args.timing)
    rows, status = execute(cases, options, meta, args.json, describe)
    report.print_all(console, rows, describe)
    if len(rows) < len(cases):
        console.print(f"Interrupted after {len(rows)} of {len(cases)} rows.")
    return status


if __name__ == "__main__":
    run_program(main)
