"""Is our sparse and distributed attention right, and is it faster than dense?

    python -m benchmarks.attention          the 56 published rows, and beyond them true
                                            dilation, blocks and rings to 4096 tokens
    python -m benchmarks.attention --full   to 65536 tokens: hours on a CPU
    python -m benchmarks.attention --grid real --plot scaling.png
    python -m benchmarks.attention --kernels   our GPU kernel, dense, causal and masks,
                                            beside others'

The published study (dilated-attention-pytorch, float32, on a GPU that its repository
says is a GTX 1080) times the forward of seven implementations, none of which dilates or
runs on more than one device. Its way to measure: --warmup 3 --iterations 10 --timing
per-call. Ours on a CPU has 1 warm-up, and fewer calls where they take long.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any

import jax
import numpy as np

from . import _attention_kernels as kernels
from . import _attention_model as model
from . import _attention_programs as programs
from . import _report as report
from . import _torch, frame
from ._attention_definitions import CANCELLATION
from ._attention_model import Blocks, Dense, Dilated, Pattern, Shape, Task
from ._attention_programs import FLEX, Entry
from ._cli import positive, refuse, run_program
from ._figures import Figure, Panel, Point
from ._harness import BOTH, FORWARD, PLAIN, XLA, Case, Row, labels

PASSES = FORWARD, BOTH
# Without the grid of the kernels, which has to be named.
GRIDS = ("published", "real")
KERNELS = "kernels"
ITERATIONS = 50
# On a CPU a row computes about so much, in so many calls at least and at most.
CPU_FLOPS, CPU_ITERATIONS = 1e10, (3, 10)

PUBLISHED_SCALE = 0.02
# The others are timed in the real grid.
PUBLISHED_PEERS = (PLAIN, "torch sdpa")

SEQS = (512, 1024, 2048)
FULL_SEQS = tuple(512 * 2**i for i in range(8))
CPU_HEADS, HEADS = 4, 16
DENSITIES, DENSITIES_SEQ = (5, 10, 25, 50, 100), 4096
RINGS, RING_SEQ = (1, 2, 4, 8), 2048


def published_entries(args: argparse.Namespace) -> list[Entry]:
    """The 56 published rows, and the peers on the same shapes."""
    rows = []
    for shape in dict.fromkeys(shape for _, shape in model.PUBLISHED):
        for name, (op, pattern, module) in model.IMPLEMENTATIONS.items():
            task = Task(shape, pattern, module, PUBLISHED_SCALE)
            count = args.devices if op == "ring_attention" else 1
            rows.append(Entry("published", op, task, args.ours, count))
            # Behind the last that is checked against the same result.
            if name == "ring_v2_collective":
                peers = _torch.present(PUBLISHED_PEERS, args)
                rows += [Entry("published", "attention", task, peer) for peer in peers]
    return rows


def real_entries(args: argparse.Namespace) -> list[Entry]:
    """Rows beyond the published ones, for what sparsity and more devices can give."""
    heads = HEADS if args.on_device else CPU_HEADS
    us, peers = args.ours, _torch.present(programs.PEERS, args)
    flex = _torch.present([FLEX], args)
    rows: list[Entry] = []

    def add(op: str, pattern: Pattern, *by: str, devices: int = 1) -> None:
        task = Task(shape, pattern)
        rows.extend(Entry("real", op, task, who, devices) for who in by)

    whole = FULL_SEQS if args.full or args.on_device else SEQS
    for seq in sorted({*whole, DENSITIES_SEQ}):
        shape, causal = Shape(1, seq, heads), Dense(is_causal=True)
        add("attention", Dense(), us)
        if seq in whole:
            add("attention", Dense(), *peers)
        if seq == DENSITIES_SEQ:
            for percent in DENSITIES:
                add("block_sparse_attention", Blocks(percent), us, *flex)
        if seq not in whole:
            continue
        rings = args.rings if seq == RING_SEQ else []
        for pattern in (Dense(), causal):
            if pattern.is_causal:
                others = (peer for peer in peers if peer != "jax.nn xla")
                add("attention", pattern, us, *others)
            for count in rings:
                add("ring_attention", pattern, us, devices=count)
        for pattern in _dilated(seq):
            by = [us, PLAIN] if args.peers and str(pattern) == "quarters" else [us]
            add("dilated_attention", pattern, *by)
        for which in ("near", "causal"):
            add("block_sparse_attention", Blocks(which), us, *flex)
    return rows


def _dilated(seq: int) -> list[Dilated]:
    quarters = (seq // 4, seq // 2, seq), (1, 2, 4)
    return [
        Dilated(*quarters, name="quarters"),
        Dilated(*quarters, is_causal=True, name="quarters"),
        Dilated((seq // 2, seq), (1, 2), name="halves"),
        Dilated((256, 1024), (1, 4), name="fixed"),
    ]


def make_cases(args: argparse.Namespace) -> list[Case]:
    if args.grid == KERNELS:
        return _kernel_cases(args)
    entries: list[Entry] = []
    if args.grid in ("published", "all"):
        entries += published_entries(args)
    if args.grid in ("real", "all"):
        entries += real_entries(args)
    return [_make_case(entry, args) for entry in entries]


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
    for_kernels = entry.grid == KERNELS
    iterations = round(np.clip(CPU_FLOPS / flops, *CPU_ITERATIONS))
    if args.on_device:
        by_xla = for_kernels and entry.by == XLA
        iterations = kernels.XLA_ITERATIONS if by_xla else ITERATIONS
    build = kernels.build if for_kernels else programs.build
    sizes = {"grid": entry.grid, "shape": str(shape)} | shape.sizes
    if entry.op == "ring_attention":
        sizes["devices"] = entry.devices
    what = entry.op, entry.task.variant, entry.by, which, args.dtype
    row = labels(*what, **sizes)
    line = model.published_of(row)
    return Case(
        labels=row,
        build=partial(build, entry, args),
        flops=flops,
        iterations=iterations,
        needed_bytes=entry.needed_bytes(args.backward),
        published_ms=line.time_ms if line and not args.backward else None,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    grids = *GRIDS, KERNELS, "all"
    help_grid = f"default: all, which is {' and '.join(GRIDS)}"
    add("--grid", choices=grids, default="all", help=help_grid)
    help_alias = "as --grid kernels; in bfloat16 on a CPU too"
    add("--kernels", action="store_const", dest="grid", const=KERNELS, help=help_alias)
    help_full = "the real grid to 65536 tokens; all sizes and rows of the kernels"
    add("--full", action="store_true", help=help_full)
    add("--backward", action="store_true", help="forward and all gradients")
    help_ring = "in the published row's ring; a CPU is split into as many (default 1)"
    add("--devices", type=positive, default=1, metavar="N", help=help_ring)


def start(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.plot and args.grid in ("published", KERNELS):
        parser.error(f"--plot draws the real grid: leave out --grid {args.grid}")
    if args.grid == "published":
        refuse(parser, args, "--grid published has no other size", "full")
    if args.grid in ("real", KERNELS):
        refuse(parser, args, "--devices are of the published grid", "devices")
    shortest = min(shape.seq for _, shape in model.PUBLISHED)
    if shortest % args.devices:
        parser.error(f"--devices must divide {shortest} tokens, got {args.devices}")
    # Before JAX starts; what else runs still has all cores. JAX's types do not have it.
    config: Any = jax.config
    count = max(args.devices, *RINGS)
    if config.jax_num_cpu_devices < count:
        config.update("jax_num_cpu_devices", count)
    if args.grid == KERNELS:
        args.dtype = args.dtype or "bfloat16"


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.devices > jax.device_count():
        parser.error(
            f"--devices must be at most the {jax.device_count()} that there are, "
            f"got {args.devices}"
        )
    args.rings = [count for count in RINGS if count <= jax.device_count()]


def notes(args: argparse.Namespace) -> dict[str, str]:
    passes = PASSES[args.backward] if args.grid != KERNELS else "each table's pass"
    lines = {
        "computed": f"{passes} of (batch, seq, heads[/key heads], dim)",
        "checked": "up to 512 queries a row, 256 of more; gradients through them",
    }
    if args.backward:
        lines["bound"] = f"of gradients: {CANCELLATION:.0e} more, as terms cancel"
    if args.grid == KERNELS:
        lines |= {
            "FLOPs": "4 dim a pair, backward 2.5 times that; masks: of their blocks",
            "x dense": "over dense by the same; of torch flex, by our kernel",
            "as dense": "the rate if no block were skipped",
            "mask": "host time to build it, once",
            "backward": "alone: both passes less the forward, with --backward",
            "registers": f"spills and shared memory: {report.program('kernels')}",
        }
        if not (args.on_device or args.full):
            lines["reduced"] = "sizes for a CPU; --full --list names those of a GPU"
        return lines | _torch.left_out((*kernels.DENSE_PEERS, FLEX), args)
    lines["memory"] = "XLA's plan for results and temporaries, on each device"
    if args.grid != "real":
        densities = ", ".join(
            f"{100 * Blocks('near').mask(seq).density:.1f} % at {seq}"
            for seq in sorted({shape.seq for _, shape in model.PUBLISHED})
        )
        lines["published"] = (
            "PyTorch, float32, forward; MiB less weights and inputs. Its improved\n"
            "attends over heads; its failed rows met modules built for 8 heads"
        )
        lines["norms"] = (
            "of query, key and result, each its own; published: one for two"
        )
        lines["near"] = f"a block of 128 and its two neighbours: {densities}"
    if args.grid != "published":
        lines["dilated"] = (
            "quarters: n/4, n/2, n by 1, 2, 4; halves: n/2, n by 1, 2;\n"
            "fixed: 256, 1024 by 1, 4"
        )
    if not args.on_device:
        lines["rings"] = "devices are parts of one CPU: memory counts, time does not"
    return lines | _torch.left_out((*programs.PEERS, FLEX), args)


def name_of(row: Row) -> str:
    """Op, variant, devices and who computes it, if that is not us."""
    name = f"{row['op']} {row['variant']}"
    if row["op"] == "ring_attention":
        name += f" on {row['devices']}"
    return name if row["by"] in programs.IMPLEMENTATIONS else f"{name} {row['by']}"


def tables(rows: Sequence[Row], meta: frame.Meta) -> Iterator[report.Table | str]:
    by_grid = {grid: group for (grid,), group in report.grouped(rows, "grid").items()}
    if "published" in by_grid:
        yield _published(by_grid["published"])
    if "real" in by_grid:
        yield _real(by_grid["real"])
    yield from _slower(rows)
    yield from kernels.tables(by_grid.get(KERNELS, ()))


def _mib(row: Row) -> str:
    return report.number(report.allocated_mib(row))


def _published(rows: Sequence[Row]) -> report.Table:
    def tokens(row: Row) -> str:
        tokens = row["batch"] * row["seq"]
        return report.number(report.over(tokens, row.get("time_ms")))

    def theirs(read, failed: str = "-") -> Any:
        def cell(row: Row) -> str:
            line = model.published_of(row)
            if line is None or row["pass"] != FORWARD:
                return "-"
            return failed if line.time_ms is None else report.number(read(line))

        return cell

    columns = {
        "ms": report.time,
        "± std": report.field("std_ms", 2),
        "ktok/s": tokens,
        "MiB": _mib,
        "publ. ms": theirs(lambda line: line.time_ms, "failed"),
        "MiB ": theirs(lambda line: line.net_mib),
        "ktok/s ": theirs(lambda line: line.tokens_per_s / 1e3),
    }
    groups = report.grouped(rows, "op", "variant", "by").values()
    title = f"The published shapes, {rows[0]['pass']}"
    ordered = chain.from_iterable(groups)
    return report.listing(title, ordered, lambda row: row["shape"], columns, name_of)


def _sizes(row: Row) -> str:
    return f"{row['pass']}, batch {row['batch']}, {row['num_heads']} heads, dim 64"


def _real(rows: Sequence[Row]) -> report.Table:
    """By sequence; work and time are over those of dense attention."""
    dense = {
        row["seq"]: row
        for row in rows
        if (row["op"], row["variant"]) == ("attention", "dense")
        and row["by"] in programs.IMPLEMENTATIONS
    }

    def work(row: Row) -> str:
        whole = Task(Shape.of(row), Dense()).flops(row["pass"])
        return f"{row['flops'] / whole:.3f}"

    def times(row: Row) -> str:
        return report.ratio(time_over(row, dense.get(row["seq"])))

    columns = report.times(rows) | {"MiB": _mib, "work": work, "time": times}
    return report.listing(
        f"{_sizes(rows[0])}; work and time: over those of attention",
        rows,
        name_of,
        columns,
        lambda row: f"n = {row['seq']}",
    )


def time_over(row: Row, other: Row | None) -> float | None:
    """How many times as long as the other; None where one of them has no time."""
    if row["status"] != "ok" or other is None or other["status"] != "ok":
        return None
    return row["time_ms"] / other["time_ms"]


def slower_than_plain(rows: Sequence[Row]) -> dict[str, float]:
    """Our rows that take longer than plain jnp does, and how many times as long.

    A row of plain jnp computes the same; for blocks and rings the dense result.
    """
    plain = [row for row in rows if row["by"] == PLAIN]
    found = report.grouped(plain, "grid", "shape", "op", "variant")
    slower = {}
    for row in rows:
        if row["by"] not in programs.IMPLEMENTATIONS or "multi-head" in row["variant"]:
            continue
        op, variant = row["op"], row["variant"]
        if op != "dilated_attention" or variant == "dense":
            op, variant = "attention", "causal" if variant == "causal" else "dense"
        beside, *_ = found.get((row["grid"], row["shape"], op, variant), [None])
        times = time_over(row, beside)
        if times is not None and times > 1:
            slower[f"{name_of(row)} {row['shape']}"] = times
    return slower


def _slower(rows: Sequence[Row]) -> Iterator[str]:
    if any(row["by"] == PLAIN and row["status"] == "ok" for row in rows):
        slower = slower_than_plain(rows)
        yield f"Slower than plain jnp: {len(slower) or 'none'} of our rows."
        for name, times in slower.items():
            yield f"  {name}: {times:.2f} times its time"


def exponent(seqs: Sequence[float], values: Sequence[float]) -> float:
    """b of the least-squares fit log value = a + b log seq."""
    return float(np.polyfit(np.log(seqs), np.log(values), 1)[0])


def figure(rows: Sequence[Row], meta: frame.Meta) -> Figure | None:
    """Time and memory against the length, with the exponent that fits each line."""
    real = [row for row in rows if row["grid"] == "real"]
    lines = report.grouped(filter(report.steady, real), name_of).items()
    lines = {name: group for (name,), group in lines if len(group) > 1}
    if not lines:
        return None
    times = {
        name: [Point(row["seq"], row["time_ms"], row["std_ms"]) for row in group]
        for name, group in lines.items()
    }
    # A torch row has no compiler's plan, so no memory on a CPU.
    memory = {
        name: [
            Point(row["seq"], mib)
            for row in group
            if (mib := report.allocated_mib(row))
        ]
        for name, group in lines.items()
    }
    memory = {name: points for name, points in memory.items() if points}

    def fit(points: Sequence[Point]) -> str:
        if len(points) < 2:
            return "-"
        return f"{exponent([p.x for p in points], [p.y for p in points]):.2f}"

    exponents = {
        name: f" ({fit(points)}, {fit(memory.get(name, ()))})"
        for name, points in times.items()
    }
    x = "n, tokens (log scale)"
    log: Any = {"log_x": True, "log_y": True}
    panels = [
        [Panel("milliseconds", x, "ms (log scale)", times, **log)],
        [Panel("MiB of results and temporaries", x, "MiB (log scale)", memory, **log)],
    ]
    title = f"{_sizes(real[0])}; in brackets b of time ~ n^b, of memory ~ n^b"
    return Figure(panels, title, exponents)


BENCHMARK = frame.Benchmark(
    name="attention",
    question=__doc__ or "",
    cases=make_cases,
    tables=tables,
    describe=("grid", "shape", "op", "variant", "on devices", "by", "pass"),
    options=add_options,
    start=start,
    settle=settle,
    notes=notes,
    figure=figure,
    cpu_warmup=1,
)
main = partial(frame.main, BENCHMARK)


if __name__ == "__main__":
    run_program(main)
