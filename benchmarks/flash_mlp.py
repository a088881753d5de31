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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import product
from typing import Any

import jaxkern
from jaxkern.testing import plain

from . import _flash_mlp_definitions as definitions
from . import _report as report
from . import _torch, frame
from ._cli import refuse, run_program
from ._figures import Figure, Panel, Point
from ._flash_mlp_definitions import Shape
from ._h200 import percent_of_floor
from ._harness import BOTH, FORWARD, KERNEL, PLAIN, XLA, Case, Program, Row, labels

PASSES = FORWARD, BOTH
ITERATIONS, CPU_ITERATIONS = 100, 10
# A CPU's default takes that part of the published tokens, to end within two minutes.
CPU_PART = 8
DIMS = (32, 64, 96, 128, 192, 256)
HIDDEN = (512, 1024, 2048, 4096, 8192)
SWEEP = [Shape(16, 2048, dim, hidden) for dim in DIMS for hidden in HIDDEN]
CPU_SWEEP = [
    Shape(2, 256, s.head_dim, s.hidden_dim) for s in SWEEP if s.hidden_dim <= 2048
]
NAIVE, PEER = "naive jnp", "peer"
JAX = (KERNEL, XLA, NAIVE, PLAIN)
# Whom memory is saved over: the first of these that has been measured.
BASELINES = ("torch eager", NAIVE)


def build(by: str, shape: Shape, which: str, args: argparse.Namespace) -> Program:
    backward = which == BOTH
    key = shape, args.dtype, args.seed, backward
    inputs = definitions.arguments(*key)
    check = partial(definitions.check, key, inputs)
    if by == NAIVE:
        return definitions.naive(inputs, check, backward)
    if by not in JAX:
        module = definitions.torch_module
        if by == PEER:
            module = _without_namespace(_torch.load(args.peer))
        return _torch.program(module, by, inputs, check, backward)
    fn: Any = plain.flash_mlp
    ours = by in (KERNEL, XLA)
    if ours:
        implementation = "mosaic_gpu" if by == KERNEL else "xla"
        fn = partial(jaxkern.flash_mlp, implementation=implementation)
    if backward:
        return Program(plain.with_gradients(fn), inputs, check, ours=ours)
    # The sweep does not print memory, and this compiles once more.
    figures = dict if args.sweep else partial(definitions.recorded, fn, inputs)
    return Program(fn, inputs, check, figures=figures, ours=ours)


def _without_namespace(function):
    return lambda F, *args: function(*args)


def make_cases(args: argparse.Namespace) -> list[Case]:
    whole = args.on_device or args.full
    if args.sweep:
        shapes, by = SWEEP if whole else CPU_SWEEP, JAX
    else:
        part = 1 if whole else CPU_PART
        shapes = [replace(s, batch=s.batch // part) for s in definitions.PUBLISHED]
        by = *JAX, *_torch.present(_torch.FRAMEWORKS, args), *[PEER] * bool(args.peer)
    return [_make_case(*case, args) for case in product(shapes, PASSES, by)]


def _make_case(shape: Shape, which: str, by: str, args: argparse.Namespace) -> Case:
    flops = definitions.count_flops(shape, which)
    grid = "sweep" if args.sweep else "published"
    sizes = {"grid": grid, "shape": str(shape)} | vars(shape)
    ms, _ = definitions.published_of(shape, which, "published fused")
    return Case(
        labels=labels("flash_mlp", "", by, which, args.dtype, **sizes),
        build=partial(build, by, shape, which, args),
        flops=flops,
        iterations=ITERATIONS if args.on_device else CPU_ITERATIONS,
        # The float64 check is the largest part, since it holds the hidden layer.
        needed_bytes=8 * flops / shape.head_dim,
        published_ms=None if args.sweep else ms,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sweep", action="store_true", help="30 sizes beside the published ones")
    help_peers = "PyTorch, where it is installed; JAX's rows are there without it too"
    peers = argparse.BooleanOptionalAction
    add("--peers", action=peers, default=True, help=help_peers)
    add(
        "--peer",
        type=_torch.peer("flash_mlp"),
        metavar="PATH.py[:NAME]",
        help="one more row: a function (default flash_mlp) of the torch tensors x, w1 "
        "and w2, (heads, batch, dim) and so on, that returns y",
    )


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.sweep:
        refuse(parser, args, "--sweep has JAX's rows only", "peer")


def notes(args: argparse.Namespace) -> dict[str, str]:
    lines = {"shapes": "(heads, batch, dim, hidden), silu"}
    whole = args.on_device or args.full
    if not whole and args.sweep:
        lines["reduced"] = "fewer heads, batch and hidden than on a GPU"
    elif not whole:
        lines["reduced"] = (
            f"1/{CPU_PART} of the published batch, so no published figures; see --full"
        )
    lines[NAIVE] = "a program an operation, as eager JAX; plain jnp is one program"
    if args.sweep:
        return lines
    lines["memory"] = "over weights and input; a forward's with what a backward needs"
    lines["  JAX's"] = "XLA's plan for results and temporaries"
    lines["  PyTorch's"] = "the peak of its allocator, on CUDA only"
    if whole:
        lines["published"] = "PyTorch eager and Triton, bfloat16, on a GPU not named"
    if args.peer:
        lines[PEER] = str(args.peer)
    return lines | _torch.left_out(_torch.FRAMEWORKS, args)


def shape_of(row: Row) -> Shape:
    return Shape(*(int(row[x.name]) for x in fields(Shape)))


def with_published(rows: Sequence[Row]) -> list[Row]:
    """The published rows behind ours of the same shape and pass."""
    found = []
    names = "shape", "pass", *(x.name for x in fields(Shape))
    for group in report.grouped(rows, "shape", "pass").values():
        found += group
        same: Row = {name: group[0][name] for name in names} | {"status": "ok"}
        shape, which = shape_of(same), same["pass"]
        for by in definitions.PUBLISHED_BY:
            ms, mib = definitions.published_of(shape, which, by)
            if ms is not None:
                tflops = definitions.count_flops(shape, which) / ms / 1e9
                row = same | {"by": by, "time_ms": ms, "tflops": tflops}
                found.append(row | {"allocated_bytes": mib and mib * 2**20})
    return found


def is_sweep(rows: Sequence[Row]) -> bool:
    return any(row["grid"] == "sweep" for row in rows)


def tables(rows: Sequence[Row], meta: frame.Meta) -> Iterator[report.Table]:
    by_pass = report.grouped(rows, "pass")
    if is_sweep(rows):
        yield from map(_rates, by_pass.values())
        return
    yield from map(_times, by_pass.values())
    yield from _memory(rows)
    for (which,), of_pass in by_pass.items():
        yield floors(which, of_pass)


def _times(rows: Sequence[Row]) -> report.Table:
    """Rates are of the wall clock, as the published ones are."""
    by_wall = [
        row | {"tflops": row["flops"] / row["time_ms"] / 1e9}
        if row["status"] == "ok"
        else row
        for row in rows
    ]
    columns = report.times(rows)
    title = f"{rows[0]['pass']}, median ms"
    if report.on_gpu(rows):
        title += "; device: of the kernels alone, as is % floor"
        columns |= {"device": report.field("device_ms"), "% floor": _percent}
    else:
        columns["compile s"] = report.field("compile_s", 2)
    shown = with_published(by_wall)
    return report.listing(
        title, shown, lambda r: r["by"], columns, lambda r: r["shape"]
    )


def _percent(row: Row) -> str:
    floors = definitions.floors_us(shape_of(row), row["pass"])
    return report.number(percent_of_floor(row | {"floors_us": floors}))


def _memory(rows: Sequence[Row]) -> Iterator[report.Table]:
    """Memory of the passes, and how much less it is than that of the eager form."""
    known = [
        row
        for row in with_published(rows)
        if row["status"] == "ok" and report.allocated_mib(row) is not None
    ]
    # A torch row has no compiler's plan, so no memory on a CPU.
    measured = {row["by"] for row in known}
    eager = next((by for by in BASELINES if by in measured), "")
    mib = {(r["shape"], r["pass"], r["by"]): report.allocated_mib(r) for r in known}
    lines: list[tuple[str, list[str]]] = []
    for shape, by in report.grouped(known, "shape", "by"):
        baseline = "published eager" if by.startswith("published") else eager
        cells = []
        for which in PASSES:
            own = mib.get((shape, which, by))
            share = report.over(own, mib.get((shape, which, baseline)))
            # Without the sign of a zero that was rounded.
            saved = "-" if share is None else f"{round(100 * (1 - share), 1) + 0:.1f}"
            cells += [report.number(own), saved]
        lines.append((shape, [by, *cells]))
    title = "MiB allocated" + f", and percent saved over {eager}" * bool(eager)
    if lines:
        yield report.Table(
            title, ["", FORWARD, "saved", BOTH, "saved"], report.headed(lines)
        )


def floors(which: str, rows: Sequence[Row]) -> report.Table:
    """Floors of the rows' published shapes, of which a CPU has a part of the batch."""
    measured = {replace(shape_of(row), batch=0) for row in rows}
    lines = []
    for shape in definitions.PUBLISHED:
        if replace(shape, batch=0) in measured:
            cells = map(report.number, definitions.floors_us(shape, which).values())
            lines.append([str(shape), *cells])
    title = f"{which}, floors of one H200 in us by matmuls (tensor), bytes moved and "
    title += "special functions (mufu)"
    return report.Table(title, ["", "tensor", "bytes", "mufu"], lines, predicted=True)


def _rates(rows: Sequence[Row]) -> report.Table:
    """Rates by dim and hidden size, a column an implementation."""

    def over_xla(kernel: Row, xla: Row) -> str:
        return report.ratio(report.over(kernel["tflops"], xla["tflops"]))

    more: dict[str, Any] = {}
    if {KERNEL, XLA} <= {row["by"] for row in rows if row["status"] == "ok"}:
        more["kernel/xla"] = partial(_of_both, over_xla)
        more["% floor"] = partial(_of_both, lambda kernel, xla: _percent(kernel))
    unit, read = next(iter(report.rate(rows).items()))
    first = rows[0]
    return report.pivot(
        f"{first['pass']}, {first['num_heads']} heads x {first['batch']}, {unit}",
        rows,
        line=lambda row: f"hidden {row['hidden_dim']}",
        column=lambda row: row["by"].removeprefix("jaxkern "),
        cell=read,
        more=more,
        head=lambda row: f"dim {row['head_dim']}",
    )


def _of_both(read, found: Mapping[str, Row]) -> str:
    by = {row["by"]: row for row in found.values() if row["status"] == "ok"}
    return read(by[KERNEL], by[XLA]) if {KERNEL, XLA} <= by.keys() else "-"


def figure(rows: Sequence[Row], meta: frame.Meta) -> Figure | None:
    rows = [row for row in rows if report.steady(row)]
    if not rows:
        return None
    return _sweep_figure(rows) if is_sweep(rows) else _time_figure(rows)


def _time_figure(rows: Sequence[Row]) -> Figure:
    """Milliseconds by shape, a panel a pass: dots, since the axis is logarithmic."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    gpu = report.on_gpu(rows)

    def points(rows: Sequence[Row], time: str) -> list[Point]:
        spread = "std_ms" if time == "time_ms" else ""
        return [
            Point(shapes.index(row["shape"]), row[time], row.get(spread))
            for row in rows
            if row.get(time)
        ]

    panels = []
    for (which,), group in report.grouped(rows, "pass").items():
        by = report.grouped(with_published(group), "by").items()
        limits = {r["shape"]: definitions.floors_us(shape_of(r), which) for r in group}
        marks = [
            Point(shapes.index(s), max(us.values()) / 1e3) for s, us in limits.items()
        ]
        panel = Panel(
            which,
            "(heads, batch, dim, hidden)",
            "milliseconds (log scale)",
            {name: points(of_name, "time_ms") for (name,), of_name in by},
            names=shapes,
            outlined={name: points(of_name, "device_ms") for (name,), of_name in by},
            limits=marks if gpu else (),
            log_y=True,
        )
        panels.append([panel])
    return Figure(
        panels,
        outlined="kernels alone (CUPTI)" if gpu else "",
        limits="floor of an H200, predicted" if gpu else "",
    )


def _sweep_figure(rows: Sequence[Row]) -> Figure:
    """Rates by hidden size, a line a dim; a panel an implementation and pass."""
    unit, factor = ("TFLOP/s", 1) if report.on_gpu(rows) else ("GFLOP/s", 1e3)
    names = list(dict.fromkeys(row["by"] for row in rows))
    grid = []
    for (which,), group in report.grouped(rows, "pass").items():
        line = []
        for name in names:
            own = [row for row in group if row["by"] == name]
            own.sort(key=lambda row: row["hidden_dim"])
            series = {
                f"dim {dim}": [
                    Point(row["hidden_dim"], factor * row["tflops"]) for row in of_dim
                ]
                for (dim,), of_dim in report.grouped(own, "head_dim").items()
            }
            y = f"{which}, {unit}"
            line.append(Panel(name, "hidden (log scale)", y, series, log_x=True))
        grid.append(line)
    return Figure(grid)


BENCHMARK = frame.Benchmark(
    name="flash_mlp",
    question=__doc__ or "",
    cases=make_cases,
    tables=tables,
    describe=("shape", "pass", "by"),
    options=add_options,
    settle=settle,
    notes=notes,
    figure=figure,
)
main = partial(frame.main, BENCHMARK)


if __name__ == "__main__":
    run_program(main)
