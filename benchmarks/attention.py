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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import jax
import numpy as np

from . import _attention_kernels as kernels
from . import _attention_programs as programs
from . import _torch, frame
from ._attention_definitions import CANCELLATION
from ._attention_model import (
    PUBLISHED,
    Blocks,
    Dense,
    Dilated,
    Pattern,
    Published,
    Shape,
    Task,
)
from ._attention_programs import FLEX, Entry
from ._cli import positive, refuse, run_program
from ._figures import Figure, Panel, Point
from ._h200 import percent_of_floor
from ._harness import BOTH, FORWARD, KERNEL, PICKED, PLAIN, XLA, Case, Row
from ._harness import labels as make_labels
from ._report import (
    Table,
    allocated_mib,
    field,
    grouped,
    listing,
    number,
    on_gpu,
    over,
    program,
    rate,
    ratio,
    steady,
    time,
)

PASSES = FORWARD, BOTH
# Without the grid of the kernels, which has to be named.
GRIDS = ("published", "real")
KERNELS = "kernels"
ITERATIONS = 50
# On a CPU a row computes about so much, in so many calls at least and at most.
CPU_FLOPS, CPU_ITERATIONS = 1e10, (3, 10)

# The published names, and for each our op, the pattern and the module around it.
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
PUBLISHED_PEERS = (PLAIN, "torch sdpa")

SEQS = (512, 1024, 2048)
FULL_SEQS = tuple(512 * 2**i for i in range(8))
CPU_HEADS, HEADS = 4, 16
DENSITIES, DENSITIES_SEQ = (5, 10, 25, 50, 100), 4096
RINGS, RING_SEQ = (1, 2, 4, 8), 2048


def ours(args: argparse.Namespace) -> str:
    return PICKED if args.on_device else XLA


def published_entries(args: argparse.Namespace) -> list[Entry]:
    """The 56 published rows, and the peers on the same shapes."""
    rows = []
    for shape in dict.fromkeys(shape for _, shape in PUBLISHED):
        for name, (op, pattern, module) in IMPLEMENTATIONS.items():
            task = Task(shape, pattern, module, PUBLISHED_SCALE)
            count = args.devices if op == "ring_attention" else 1
            rows.append(Entry("published", op, task, ours(args), count))
            # Behind the last that is checked against the same result.
            if name == "ring_v2_collective":
                rows += [
                    Entry("published", "attention", task, peer)
                    for peer in programs.peers(args)
                    if peer in PUBLISHED_PEERS
                ]
    return rows


def real_entries(args: argparse.Namespace) -> list[Entry]:
    """Rows beyond the published ones, for what sparsity and more devices can give."""
    heads = HEADS if args.on_device else CPU_HEADS
    us, peers = ours(args), programs.peers(args)
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
    least, most = CPU_ITERATIONS
    iterations = round(min(max(CPU_FLOPS / flops, least), most))
    for_kernels = entry.grid == KERNELS
    if args.on_device:
        by_xla = for_kernels and entry.by == XLA
        iterations = kernels.XLA_ITERATIONS if by_xla else ITERATIONS
    build = kernels.build if for_kernels else programs.build
    sizes = {"grid": entry.grid, "shape": str(shape)} | shape.sizes
    if entry.op == "ring_attention":
        sizes["devices"] = entry.devices
    what = entry.op, entry.variant, entry.by, which, args.dtype
    row = make_labels(*what, **sizes)
    line = published_of(row)
    return Case(
        labels=row,
        build=partial(build, entry, args),
        flops=flops,
        iterations=iterations,
        needed_bytes=entry.needed_bytes(args.backward),
        published_ms=line.time_ms if line and not args.backward else None,
    )


def published_of(row: Mapping[str, Any]) -> Published | None:
    """The published row of one of ours, by its op and variant."""
    if row["grid"] != "published" or row["by"] not in programs.IMPLEMENTATIONS:
        return None
    shape = shape_of(row)
    for name, (op, pattern, module) in IMPLEMENTATIONS.items():
        entry = Entry("published", op, Task(shape, pattern, module), row["by"])
        if (entry.op, entry.variant) == (row["op"], row["variant"]):
            return PUBLISHED.get((name, shape))
    return None


def add_options(parser: argparse.ArgumentParser) -> None:
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
    help_devices = (
        "in the published row's ring; a CPU is split into as many (default 1)"
    )
    add("--devices", type=positive, default=1, metavar="N", help=help_devices)


def start(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.plot and args.grid in ("published", KERNELS):
        parser.error(f"--plot draws the real grid: leave out --grid {args.grid}")
    if args.grid == "published":
        refuse(parser, args, "--grid published has no other size", "full")
    if args.grid in ("real", KERNELS):
        refuse(parser, args, "--devices are of the published grid", "devices")
    shortest = min(shape.seq for _, shape in PUBLISHED)
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
            "registers": f"spills and shared memory: {program('kernels')}",
        }
        if not (args.on_device or args.full):
            lines["reduced"] = "sizes for a CPU; --full --list names those of a GPU"
        return lines | _torch.left_out((*kernels.DENSE_PEERS, FLEX), args)
    lines["memory"] = "XLA's plan for results and temporaries, on each device"
    if args.grid != "real":
        densities = ", ".join(
            f"{100 * Blocks('near').mask(seq).density:.1f} % at {seq}"
            for seq in sorted({shape.seq for _, shape in PUBLISHED})
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


def shape_of(row: Mapping[str, Any]) -> Shape:
    group = row["num_heads"] // row["num_kv_heads"]
    names = "batch", "seq", "num_heads", "head_dim"
    return Shape(*(int(row[name]) for name in names), group=group)


def name_of(row: Row) -> str:
    """Op, variant, devices and who computes it, if that is not us."""
    name = f"{row['op']} {row['variant']}"
    if row["op"] == "ring_attention":
        name += f" on {row['devices']}"
    return name if row["by"] in programs.IMPLEMENTATIONS else f"{name} {row['by']}"


def tables(rows: Sequence[Row], meta: frame.Meta) -> Iterator[Table | str]:
    by_grid = {grid: group for (grid,), group in grouped(rows, "grid").items()}
    if "published" in by_grid:
        yield _published(by_grid["published"])
    if "real" in by_grid:
        yield _real(by_grid["real"])
    yield from _slower(rows)
    if KERNELS not in by_grid:
        return
    for (which,), group in grouped(by_grid[KERNELS], "pass").items():
        yield _kernel_rates(group, which)
    yield from _backward(by_grid[KERNELS])


def _thousand_tokens(row: Row) -> str:
    return number(over(row["batch"] * row["seq"], row.get("time_ms")))


def _mib(row: Row) -> str:
    return number(allocated_mib(row))


def _published(rows: Sequence[Row]) -> Table:
    columns = {"ms": time, "± std": field("std_ms", 2)}
    columns |= {"ktok/s": _thousand_tokens, "MiB": _mib}

    def theirs(read, failed: str = "-") -> Any:
        def cell(row: Row) -> str:
            line = published_of(row)
            if line is None or row["pass"] != FORWARD:
                return "-"
            return failed if line.time_ms is None else number(read(line))

        return cell

    columns["publ. ms"] = theirs(lambda line: line.time_ms, "failed")
    columns["MiB "] = theirs(lambda line: line.net_mib)
    columns["ktok/s "] = theirs(lambda line: line.tokens_per_s / 1e3)
    ordered = [
        row for group in grouped(rows, "op", "variant", "by").values() for row in group
    ]
    title = f"The published shapes, {rows[0]['pass']}"
    return listing(title, ordered, lambda row: row["shape"], columns, name_of)


def _real(rows: Sequence[Row]) -> Table:
    """By sequence; work and time are over those of dense attention."""
    first = rows[0]
    dense = {
        row["seq"]: row
        for row in rows
        if (row["op"], row["variant"]) == ("attention", "dense")
        and row["by"] in programs.IMPLEMENTATIONS
    }

    def work(row: Row) -> str:
        whole = Task(shape_of(row), Dense()).flops(row["pass"])
        return f"{row['flops'] / whole:.3f}"

    def times(row: Row) -> str:
        return ratio(time_over(row, dense.get(row["seq"])))

    sizes = f"batch {first['batch']}, {first['num_heads']} heads, dim 64"
    columns = {"ms": time, "± std": field("std_ms", 2)} | rate(rows)
    columns |= {"MiB": _mib, "work": work, "time": times}
    return listing(
        f"{first['pass']}, {sizes}; work and time: over those of attention",
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
    found = {
        (r["grid"], r["shape"], r["op"], r["variant"]): r
        for r in rows
        if r["by"] == PLAIN
    }
    slower = {}
    for row in rows:
        if row["by"] not in programs.IMPLEMENTATIONS or "multi-head" in row["variant"]:
            continue
        op, variant = row["op"], row["variant"]
        if op != "dilated_attention" or variant == "dense":
            op, variant = "attention", "causal" if variant == "causal" else "dense"
        times = time_over(row, found.get((row["grid"], row["shape"], op, variant)))
        if times is not None and times > 1:
            slower[f"{name_of(row)} {row['shape']}"] = times
    return slower


def _slower(rows: Sequence[Row]) -> Iterator[str]:
    if any(row["by"] == PLAIN and row["status"] == "ok" for row in rows):
        slower = slower_than_plain(rows)
        yield f"Slower than plain jnp: {len(slower) or 'none'} of our rows."
        for name, times in slower.items():
            yield f"  {name}: {times:.2f} times its time"


def time_of(row: Row | None) -> float | None:
    """Milliseconds of the kernels alone where they are known, as rates have them."""
    if row is None or row["status"] != "ok":
        return None
    return row[row["rate_from"]]


def dense_beside(rows: Sequence[Row], row: Row) -> Row | None:
    """The dense row of the same shape and pass: its own, a peer's mask our kernel's."""
    by = KERNEL if row["by"] == FLEX else row["by"]
    wanted = "dense", by, row["shape"], row["pass"]
    keys = "variant", "by", "shape", "pass"
    return next((r for r in rows if tuple(r[k] for k in keys) == wanted), None)


def speed_up(rows: Sequence[Row], row: Row) -> float | None:
    return over(time_of(dense_beside(rows, row)), time_of(row))


def floor_percent(row: Row) -> float | None:
    floors = kernels.floors_us(shape_of(row), row["pass"], row["flops"])
    return percent_of_floor(row | {"floors_us": floors})


def _kernel_rates(rows: Sequence[Row], which: str) -> Table:
    factor = 1 if on_gpu(rows) else 1e3

    def as_dense(row: Row) -> str:
        flops = Task(shape_of(row), Dense()).flops(which)
        own = time_of(row)
        return number(None if own is None else factor * flops / own / 1e9)

    columns = {"ms": time, "± std": field("std_ms", 2)} | rate(rows)
    columns |= {"as dense": as_dense, "x dense": lambda r: ratio(speed_up(rows, r))}
    columns["mask ms"] = field("mask_ms")
    if on_gpu(rows):
        columns["% floor"] = lambda row: number(floor_percent(row))
    return listing(
        which,
        rows,
        lambda row: f"{row['variant']} {row['by'].removeprefix('jaxkern ')}",
        columns,
        lambda row: row["shape"],
    )


def backward_rows(rows: Sequence[Row]) -> list[Row]:
    """The backward alone, where both passes and the forward were measured."""
    found = []
    for _, group in grouped(rows, "shape", "op", "variant", "by").items():
        times = {row["pass"]: time_of(row) for row in group}
        forward, both = (times.get(which) for which in PASSES)
        if forward and both and both > forward:
            row = next(row for row in group if row["pass"] == BOTH)
            # 2.5 of the 3.5 times that both passes have of the forward's.
            flops, ms = row["flops"] * 2.5 / 3.5, both - forward
            found.append(row | {"time_ms": ms, "tflops": flops / ms / 1e9})
    return found


def _backward(rows: Sequence[Row]) -> Iterator[Table]:
    alone = backward_rows(rows)
    if alone:
        yield listing(
            "backward alone",
            alone,
            lambda row: f"{row['variant']} {row['by'].removeprefix('jaxkern ')}",
            {"ms": field("time_ms")} | rate(rows),
            lambda row: row["shape"],
        )


def exponent(seqs: Sequence[float], values: Sequence[float]) -> float:
    """b of the least-squares fit log value = a + b log seq."""
    return float(np.polyfit(np.log(seqs), np.log(values), 1)[0])


def figure(rows: Sequence[Row], meta: frame.Meta) -> Figure | None:
    """Time and memory against the length, with the exponent that fits each line."""
    series: dict[str, dict[str, list[Point]]] = {"ms": {}, "MiB": {}}
    named = [row | {"name": name_of(row)} for row in rows if row["grid"] == "real"]
    for (name,), group in grouped(filter(steady, named), "name").items():
        if len(group) > 1:
            for row in group:
                point = Point(row["seq"], row["time_ms"], row["std_ms"])
                series["ms"].setdefault(name, []).append(point)
                # A torch row has no compiler's plan, so no memory on a CPU.
                mib = allocated_mib(row)
                if mib:
                    points = series["MiB"].setdefault(name, [])
                    points.append(Point(row["seq"], mib))
    if not series["ms"]:
        return None

    def fit(points: Sequence[Point] | None) -> str:
        if not points or len(points) < 2:
            return "-"
        return f"{exponent([p.x for p in points], [p.y for p in points]):.2f}"

    labels = {
        n: f" ({', '.join(fit(p.get(n)) for p in series.values())})"
        for n in series["ms"]
    }
    first = named[0]
    sizes = f"batch {first['batch']}, {first['num_heads']} heads, dim 64"
    x = "n, tokens (log scale)"
    words = {"ms": "milliseconds", "MiB": "MiB of results and temporaries"}
    panels = [
        Panel(words[key], x, f"{key} (log scale)", lines, log_x=True, log_y=True)
        for key, lines in series.items()
    ]
    title = f"{first['pass']}, {sizes}; in brackets b of time ~ n^b, of memory ~ n^b"
    return Figure([[panel] for panel in panels], title, labels)


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
