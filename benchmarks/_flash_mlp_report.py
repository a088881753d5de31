"""Tables and plots of `benchmarks.flash_mlp`."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Console

from . import _flash_mlp_model as model
from . import _torch
from ._flash_mlp_model import FLOORS, PASSES, Shape
from ._harness import Row
from ._report import number, print_problems, print_table, table

Line = Mapping[str, str] | None
PUBLISHED_ROWS = {"published eager": "eager", "published fused": "fused"}
# Of whom, for each pass: the columns of its published time and memory.
PUBLISHED_COLUMNS = {
    "eager": {
        "forward": ("pytorch_fwd_ms", "pytorch_fwd_alloc_mb"),
        "forward+backward": ("pytorch_fwd_bwd_ms", "pytorch_peak_mb"),
    },
    "fused": {
        "forward": ("triton_fwd_ms", "triton_fwd_alloc_mb"),
        "forward+backward": ("triton_fwd_bwd_ms", "triton_peak_mb"),
    },
}
# Whom memory is saved over: the first of these that has been measured.
BASELINES = ("torch eager", "naive jnp")


def published_ms(line: Line, which: str, whose: str) -> float | None:
    return _published(line, which, whose, 0)


def published_mib(line: Line, which: str, whose: str) -> float | None:
    return _published(line, which, whose, 1)


def _published(line: Line, which: str, whose: str, column: int) -> float | None:
    text = line[PUBLISHED_COLUMNS[whose][which][column]] if line else ""
    return float(text) if text else None


def notes(args: argparse.Namespace, part: int) -> dict[str, str]:
    """Lines of the header."""
    lines = {"shapes": "(heads, batch, dim, hidden), silu"}
    if args.sweep and not (args.on_device or args.full):
        lines["reduced"] = "fewer heads, batch and hidden than on a GPU"
    elif not (args.compared or args.sweep):
        lines["reduced"] = (
            f"1/{part} of the published batch, so no published figures; see --full"
        )
    lines["naive jnp"] = (
        "a program an operation, as eager JAX; plain jnp is one program"
    )
    if args.sweep:
        return lines
    lines["memory"] = "over weights and input; a forward's with what a backward needs"
    lines["  JAX's"] = "XLA's plan for results and temporaries"
    lines["  PyTorch's"] = "the peak of its allocator, on CUDA only"
    if args.compared:
        lines["published"] = "PyTorch eager and Triton, bfloat16, on a GPU not named"
    if args.peer:
        lines["peer"] = str(args.peer)
    left_out = _torch.why_left_out(args.peers)
    return lines | ({"PyTorch": f"left out: {left_out}"} if left_out else {})


def print_all(
    console: Console, rows: Sequence[Row], describe: Callable, args: argparse.Namespace
) -> None:
    if args.sweep:
        for which in PASSES:
            _print_sweep(console, [r for r in rows if r["pass"] == which], which)
    else:
        print_floors(console)
        for which in PASSES:
            _print_times(console, rows, which, args.compared)
        print_memory(console, rows, args.compared)
    errors = [row["error"] for row in rows if row["status"] == "ok"]
    if errors:
        console.print(
            "All results were checked against float64 before they were timed: errors "
            f"up to\n{max(errors):.1e}, each at most twice that of plain jnp."
        )
    if any(row.get("includes_compile") for row in rows):
        console.print("* mean, without warm-up: the first call includes compile")
    print_problems(console, rows, describe)


def print_floors(console: Console) -> None:
    """Predictions for the published shapes: floors; our kernels and their aim."""
    for which in PASSES:
        title = f"{which}, predicted us on one H200"
        result = table(title, ["", *FLOORS, "our kernels", "aim"])
        for shape in model.PUBLISHED:
            floors = model.floors_ms(shape, which)
            cells = [number(1e3 * floors[name]) for name in FLOORS]
            cells.append(number(model.predicted_us(shape, which), 2))
            aim = model.TARGETS_US.get(shape, {}).get(which)
            result.add_row(str(shape), *cells, "-" if aim is None else str(aim))
        print_table(console, result)


def shape_of(row: Row) -> Shape:
    return Shape(*(int(row[name]) for name in ("heads", "batch", "dim", "hidden")))


def by_shape(rows: Iterable[Row]) -> dict[Shape, list[Row]]:
    groups: dict[Shape, list[Row]] = {}
    for row in rows:
        groups.setdefault(shape_of(row), []).append(row)
    return groups


def _print_times(
    console: Console, rows: Sequence[Row], which: str, compared: bool
) -> None:
    rows = [row for row in rows if row["pass"] == which]
    if not rows:
        return
    timed_kernels = any(row.get("device_ms") for row in rows)
    more = "; device: of the kernels alone, as is % floor" if timed_kernels else ""
    rates = ["TFLOP/s", "device", "% floor"]
    columns = rates if timed_kernels else ["GFLOP/s", "compile s"]
    result = table(f"{which}, median ms{more}", ["", "ms", "± std", *columns])
    for shape, group in by_shape(rows).items():
        result.add_row(f"[bold]{shape}[/bold]")
        for row in group:
            cells = _time_cells(row, shape, timed_kernels)
            result.add_row(f" {row['implementation']}", *cells)
        line = model.PUBLISHED.get(shape) if compared else None
        for name, whose in PUBLISHED_ROWS.items():
            ms = published_ms(line, which, whose)
            if ms is not None:
                rate = _rate(shape, which, ms, timed_kernels)
                dashes = ["-"] * (2 if timed_kernels else 1)
                result.add_row(f" {name}", number(ms), "-", rate, *dashes)
    print_table(console, result)


def _time_cells(row: Row, shape: Shape, timed_kernels: bool) -> list[str]:
    if row["status"] != "ok":
        return [row["status"]]
    mark = "*" if row["includes_compile"] else ""
    cells = [mark + number(row["time_ms"]), number(row["std_ms"], 2)]
    cells.append(_rate(shape, row["pass"], row["time_ms"], timed_kernels))
    if timed_kernels:
        percent = number(_percent_of_floor(row, shape))
        return [*cells, number(row.get("device_ms")), percent]
    return [*cells, number(row.get("compile_s"), 2)]


def _rate(shape: Shape, which: str, ms: float, tera: bool) -> str:
    """Of the time that every row and the published ones have."""
    return number(model.count_flops(shape, which) / ms / (1e9 if tera else 1e6))


def _percent_of_floor(row: Row, shape: Shape) -> float | None:
    if not row.get("device_ms"):
        return None
    return 100 * max(model.floors_ms(shape, row["pass"]).values()) / row["device_ms"]


def allocated_mib(row: Row) -> float | None:
    """Over weights and input: of the whole program, where nothing else is known."""
    if row.get("allocated_bytes") is not None:
        return row["allocated_bytes"] / 2**20
    if "temp_bytes" in row:
        return (row["temp_bytes"] + row["output_bytes"]) / 2**20
    return None


def print_memory(console: Console, rows: Sequence[Row], compared: bool) -> None:
    """What the passes allocate, and how much less that is than the eager form's."""
    known: dict[tuple[Shape, str, str], float] = {}
    for row in rows:
        mib = allocated_mib(row)
        # A torch row has no compiler's plan, so no memory on a CPU.
        if row["status"] == "ok" and mib is not None:
            known[shape_of(row), row["pass"], row["implementation"]] = mib
    if not known:
        return
    measured = {name for _, _, name in known}
    eager = next((name for name in BASELINES if name in measured), None)
    over = f", and percent saved over {eager}" if eager else ""
    result = table(
        f"MiB allocated{over}", ["", "forward", "saved", "forward+backward", "saved"]
    )
    for shape in dict.fromkeys(shape for shape, _, _ in known):
        result.add_row(f"[bold]{shape}[/bold]")
        names = dict.fromkeys(name for s, _, name in known if s == shape)
        for name in names:
            cells = []
            for which in PASSES:
                mib = known.get((shape, which, name))
                cells += _memory_cells(mib, known.get((shape, which, eager or "")))
            result.add_row(f" {name}", *cells)
        if compared and (line := model.PUBLISHED.get(shape)):
            for name, whose in PUBLISHED_ROWS.items():
                cells = []
                for which in PASSES:
                    mib = published_mib(line, which, whose)
                    cells += _memory_cells(mib, published_mib(line, which, "eager"))
                result.add_row(f" {name}", *cells)
    print_table(console, result)


def _memory_cells(mib: float | None, eager: float | None) -> list[str]:
    if mib is None or not eager:
        return [number(mib), "-"]
    # Without the sign of a zero that was rounded.
    return [number(mib), f"{round(100 * (1 - mib / eager), 1) + 0:.1f}"]


def _print_sweep(console: Console, rows: Sequence[Row], which: str) -> None:
    """Rates by dim and hidden size, a column an implementation."""
    if not rows:
        return
    timed_kernels = any(row.get("device_ms") for row in rows)
    unit, factor = ("TFLOP/s", 1) if timed_kernels else ("GFLOP/s", 1e3)
    ok = [row for row in rows if row["status"] == "ok"]
    names = list(dict.fromkeys(row["implementation"] for row in ok))
    both = {"mosaic_gpu", "xla"} <= set(names)
    ours = ["kernel/xla", "% floor"] if both else []
    sizes = f"{rows[0]['heads']} heads x {rows[0]['batch']}"
    result = table(f"{which}, {sizes}, {unit}", ["", *names, *ours])
    dim = None
    for shape, group in by_shape(rows).items():
        if shape.dim != dim:
            dim = shape.dim
            result.add_row(f"[bold]dim {dim}[/bold]")
        found = {row["implementation"]: row for row in group if row["status"] == "ok"}
        rates = [found[n]["tflops"] if n in found else None for n in names]
        cells = [number(rate and factor * rate) for rate in rates]
        if ours:
            rate = dict(zip(names, rates, strict=True))
            kernel, xla = rate["mosaic_gpu"], rate["xla"]
            cells.append(f"{kernel / xla:.2f}" if kernel and xla else "-")
            cells.append(number(_percent_of_floor(found.get("mosaic_gpu", {}), shape)))
        result.add_row(f" hidden {shape.hidden}", *cells)
    print_table(console, result)
