"""Is our sparse and distributed attention right, and is it faster than dense?

    python -m benchmarks.attention          the 56 published rows, and beyond them true
                                            dilation, blocks and rings to 4096 tokens
    python -m benchmarks.attention --full   to 65536 tokens: hours on a CPU
    python -m benchmarks.attention --grid real --plot scaling.png
    python -m benchmarks.attention --kernels   our GPU kernel, dense, causal and masks,
                                            beside its aims and predicted times

The published study (dilated-attention-pytorch, float32, on a GPU that its repository
says is a GTX 1080) times the forward of seven implementations, none of which dilates or
runs on more than one device. Its way to measure: --warmup 3 --iterations 10 --timing
per-call. Ours on a CPU has 1 warm-up, and fewer calls where they take long.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp

from . import _attention_kernels as kernels
from . import _attention_plot as plots
from . import _attention_programs as programs
from . import _attention_report as report
from ._attention_model import (
    PASSES,
    PUBLISHED,
    Blocks,
    Dense,
    Dilated,
    Pattern,
    Shape,
    Task,
)
from ._attention_programs import FLEX, Entry
from ._cli import add_only, make_parser, positive, run_program
from ._harness import Case, Options, Row, matmul_peak_tflops
from ._report import Results, execute, list_or_run, make_console, metadata, print_header

# Without the grid of the kernels, which has to be named.
GRIDS = ("published", "real")
KERNELS = "kernels"
WARMUP, CPU_WARMUP = 5, 1
ITERATIONS = 50
# On a CPU a row computes about so much, in so many calls at least and at most.
CPU_FLOPS, CPU_ITERATIONS = 1e10, (3, 10)

# Of a published row: what computes it here, what it computes, the module around it.
IMPLEMENTATIONS: dict[str, tuple[str, Pattern, str | None]] = {
    "standard": ("attention", Dense(), None),
    "improved": ("dilated_attention", Dense(), None),
    "ring_v2_collective": ("ring_attention", Dense(), None),
    "multihead_standard": ("attention", Dense(), "norms"),
    "multihead_improved": ("dilated_attention", Dense(), "norms"),
    "block_sparse": ("block_sparse_attention", Blocks("near"), None),
    "block_sparse_multihead": ("block_sparse_attention", Blocks("near"), "plain"),
}
PUBLISHED_SCALE = 0.02
# The others are timed in the real grid.
PUBLISHED_PEERS = ("plain jnp", "torch sdpa")

SEQS = (512, 1024, 2048)
FULL_SEQS = tuple(512 * 2**i for i in range(8))
CPU_HEADS, HEADS = 4, 16
DENSITIES, DENSITIES_SEQ = (5, 10, 25, 50, 100), 4096
RINGS, RING_SEQ = (1, 2, 4, 8), 2048


def published_entries(args: argparse.Namespace) -> list[Entry]:
    """The 56 published rows, and the peers on the same shapes."""
    rows = []
    for shape in dict.fromkeys(shape for _, shape in PUBLISHED):
        for name, (by, pattern, module) in IMPLEMENTATIONS.items():
            task = Task(shape, pattern, module, PUBLISHED_SCALE)
            count = args.devices if by == "ring_attention" else 1
            rows.append(Entry("published", name, task, by, count))
            # Behind the last that is checked against the same result.
            if name == "ring_v2_collective":
                rows += [
                    Entry("published", peer, task, peer)
                    for peer in programs.peers(args)
                    if peer in PUBLISHED_PEERS
                ]
    return rows


def real_entries(args: argparse.Namespace) -> list[Entry]:
    """Beyond the published rows: what sparsity and more devices can give."""
    heads = HEADS if args.on_device else CPU_HEADS
    flex = [FLEX] if programs.why_left_out(FLEX, args) is None else []
    rows: list[Entry] = []

    def add(name: str, pattern: Pattern, *by: str, devices: int = 1) -> None:
        for who in by:
            label = f"{who} {name}" if who in (*programs.PEERS, FLEX) else name
            task = Task(shape, pattern)
            rows.append(Entry("real", label.strip(), task, who, devices))

    whole = FULL_SEQS if args.full or args.on_device else SEQS
    for seq in sorted({*whole, DENSITIES_SEQ}):
        shape = Shape(1, seq, heads)
        add("attention", Dense(), "attention")
        if seq in whole:
            add("", Dense(), *programs.peers(args))
        if seq == DENSITIES_SEQ:
            for percent in DENSITIES:
                name, pattern = f"{percent}%", Blocks(percent)
                add(f"block-sparse {name}", pattern, "block_sparse_attention")
                add(name, pattern, *flex)
        if seq not in whole:
            continue
        rings = args.rings if seq == RING_SEQ else []
        for count in rings:
            add(f"ring of {count}", Dense(), "ring_attention", devices=count)
        causal = Dense(is_causal=True)
        add("attention causal", causal, "attention")
        add("causal", causal, *(p for p in programs.peers(args) if p != "jax.nn xla"))
        for count in rings:
            name = f"ring of {count} causal"
            add(name, causal, "ring_attention", devices=count)
        for name, pattern in _dilated(seq).items():
            add(f"dilated {name}", pattern, "dilated_attention")
        if args.peers:
            add("quarters", _dilated(seq)["quarters"], "plain jnp")
        for which in ("near", "causal"):
            add(f"block-sparse {which}", Blocks(which), "block_sparse_attention")
            add(which, Blocks(which), *flex)
    return rows


def _dilated(seq: int) -> dict[str, Dilated]:
    quarters = (seq // 4, seq // 2, seq), (1, 2, 4)
    return {
        "quarters": Dilated(*quarters),
        "quarters causal": Dilated(*quarters, is_causal=True),
        "halves": Dilated((seq // 2, seq), (1, 2)),
        "fixed": Dilated((256, 1024), (1, 4)),
    }


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The rows to measure, in order."""
    entries: list[Entry] = []
    if args.grid in ("published", "all"):
        entries += published_entries(args)
    if args.grid in ("real", "all"):
        entries += real_entries(args)
    cases = [_make_case(entry, args) for entry in entries]
    if args.grid == KERNELS:
        cases = _kernel_cases(args)
    return [c for c in cases if re.search(args.only, describe(c.labels))]


def _kernel_cases(args: argparse.Namespace) -> list[Case]:
    """With --backward both passes: their difference is the backward alone."""
    cases = []
    for _, group in groupby(kernels.entries(args), key=lambda entry: entry.task):
        rows = list(group)
        for backward in (False, True)[: 1 + args.backward]:
            of_pass = argparse.Namespace(**vars(args) | {"backward": backward})
            cases += [_make_case(row, of_pass) for row in rows]
    return cases


def _make_case(entry: Entry, args: argparse.Namespace) -> Case:
    shape, which = entry.task.shape, PASSES[args.backward]
    flops = entry.task.flops(which)
    line = PUBLISHED.get((entry.name, shape)) if entry.grid == "published" else None
    least, most = CPU_ITERATIONS
    iterations = round(min(max(CPU_FLOPS / flops, least), most))
    if args.on_device:
        by_xla = entry.by == "xla"
        iterations = kernels.XLA_ITERATIONS if by_xla else ITERATIONS
    for_kernels = entry.grid == KERNELS
    label = shape.sizes if for_kernels else str(shape)
    build = kernels.build if for_kernels else programs.build
    return Case(
        labels={"grid": entry.grid, "shape": label, "implementation": entry.name}
        | {"by": entry.by, "devices": entry.devices, "pass": which}
        | vars(shape)
        | {"kv_heads": shape.kv_heads},
        build=partial(build, entry, args),
        flops=flops,
        iterations=iterations,
        needed_bytes=entry.needed_bytes(args.backward),
        published_ms=line.time_ms if line and not args.backward else None,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("benchmarks.attention", __doc__ or "", full=False, warmup=None)
    add = parser.add_argument
    add(
        "--grid",
        choices=(*GRIDS, KERNELS, "all"),
        default="all",
        help=f"default: all, which is {' and '.join(GRIDS)}",
    )
    add(
        "--kernels",
        action="store_const",
        dest="grid",
        const=KERNELS,
        default="all",
        help="as --grid kernels; in bfloat16 on a CPU too",
    )
    add(
        "--full",
        action="store_true",
        help="the real grid to 65536 tokens; all sizes and rows of the kernels",
    )
    add("--backward", action="store_true", help="forward and all gradients")
    add_only(parser)
    help_devices = (
        "in the published row's ring; a CPU is split into as many (default 1)"
    )
    add("--devices", type=positive, default=1, metavar="N", help=help_devices)
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="plain jnp and jax.nn; PyTorch and tokamax where they are installed",
    )
    args = parser.parse_args(argv)
    if args.plot and args.grid in ("published", KERNELS):
        parser.error(f"--plot draws the real grid: leave out --grid {args.grid}")
    shortest = min(shape.seq for _, shape in PUBLISHED)
    if shortest % args.devices:
        parser.error(f"--devices must divide {shortest} tokens, got {args.devices}")
    _split_cpu(max(args.devices, *RINGS))
    args.on_device = jax.default_backend() != "cpu"
    if args.devices > jax.device_count():
        parser.error(
            f"--devices must be at most the {jax.device_count()} that there are, "
            f"got {args.devices}"
        )
    if args.warmup is None:
        args.warmup = WARMUP if args.on_device else CPU_WARMUP
    args.rings = [count for count in RINGS if count <= jax.device_count()]
    narrow = args.on_device or args.grid == KERNELS
    args.dtype = jnp.dtype(args.dtype or ("bfloat16" if narrow else "float32"))
    if not make_cases(args):
        parser.error(f"--only must be found in a row of --list, got {args.only!r}")
    return args


def _split_cpu(count: int) -> None:
    """Before JAX starts; what else runs still has all cores."""
    # JAX's types do not have this option.
    config: Any = jax.config
    if config.jax_num_cpu_devices < count:
        config.update("jax_num_cpu_devices", count)


def describe(labels: Mapping[str, Any]) -> str:
    name = f"{labels['grid']} {labels['shape']} {labels['implementation']}"
    return f"{name} {labels['pass']}" if labels["grid"] == KERNELS else name


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return list_or_run(args, make_cases(args), describe, _run)


def _run(args: argparse.Namespace, cases: list[Case], precision: str) -> int:
    least, most = CPU_ITERATIONS
    default = ITERATIONS if args.on_device else f"{least} to {most}"
    calls = f"{args.iterations or default} calls after {args.warmup} warm-up"
    calls += "s" * (args.warmup != 1)
    meta = metadata(
        "attention",
        dtype=str(args.dtype),
        matmul_precision=precision,
        seed=args.seed,
        matmul_peak_tflops=matmul_peak_tflops(args.dtype),
        timing_text=f"{args.timing}, {calls}",
        notes=report.notes(args),
        **({"predicted": kernels.predictions()} if args.grid == KERNELS else {}),
    )
    console = make_console()
    print_header(console, (__doc__ or "").splitlines()[0], meta)
    options = Options(args.warmup, args.iterations, args.timing)
    rows, status = execute(cases, options, meta, args.json, describe)
    if args.grid == KERNELS:
        status = _add_figures(rows, args, meta, len(cases)) or status
    report.print_all(console, rows, describe, args)
    if args.plot:
        plots.plot(console, rows, args.plot, meta)
    if len(rows) < len(cases):
        console.print(f"Interrupted after {len(rows)} of {len(cases)} rows.")
    return status


def _add_figures(
    rows: list[Row], args: argparse.Namespace, meta: Mapping[str, Any], count: int
) -> int:
    """What needs other rows of the run, for the tables and, once more, the file."""
    tasks = {(e.task.shape.sizes, e.name): e.task for e in kernels.entries(args)}
    kernels.add_figures(rows, tasks, args.on_device)
    results = Results(args.json, meta)
    results.rows = rows
    return int(not results.end(complete=len(rows) == count))


if __name__ == "__main__":
    run_program(main)
