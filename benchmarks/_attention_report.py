"""Tables of `benchmarks.attention`."""

import argparse
from collections.abc import Callable, Sequence

from rich.console import Console

from . import _attention_kernels as kernels
from . import _attention_kernels_report as kernels_report
from . import _attention_programs as programs
from ._attention_definitions import CANCELLATION
from ._attention_model import (
    PASSES,
    PUBLISHED,
    Blocks,
    Dense,
    Published,
    Shape,
    Task,
)
from ._harness import Row
from ._report import number, print_problems, print_table, table

PLAIN = "plain jnp"
DILATED = "dilated_attention of n by 1"
# What the published names stand for here.
TITLES = {
    "standard": "attention",
    "improved": f"{DILATED}, the same result by that path",
    "ring_v2_collective": "ring_attention",
    "multihead_standard": "nn.MultiHeadAttention over attention",
    "multihead_improved": f"nn.MultiHeadAttention over {DILATED}",
    "block_sparse": "block_sparse_attention",
    "block_sparse_multihead": "nn.MultiHeadAttention over it, without norms",
}


def notes(args: argparse.Namespace) -> dict[str, str]:
    """Lines of the header."""
    if args.grid == "kernels":
        peers = (*kernels.DENSE_PEERS, programs.FLEX)
        return _left_out(args, peers) | kernels_report.notes(args)
    lines = {
        "computed": f"{PASSES[args.backward]} of (batch, seq, heads) with dim 64",
        "checked": "up to 512 queries a row, 256 of more; gradients through them",
        "memory": "XLA's plan for results and temporaries, on each device",
    }
    if args.grid != "real":
        densities = ", ".join(
            f"{100 * Blocks('near').mask(seq).density:.1f} % at {seq}"
            for seq in sorted({shape.seq for _, shape in PUBLISHED})
        )
        lines["published"] = _below(
            "PyTorch, float32, forward; MiB less weights and inputs. Its improved",
            "attends over heads; its failed rows met modules built for 8 heads",
        )
        lines["norms"] = (
            "of query, key and result, each its own; published: one for two"
        )
        lines["near"] = f"a block of 128 and its two neighbours: {densities}"
    if args.grid != "published":
        lines["dilated"] = _below(
            "quarters: n/4, n/2, n by 1, 2, 4; halves: n/2, n by 1, 2;",
            "fixed: 256, 1024 by 1, 4",
        )
    if not args.on_device:
        lines["rings"] = "devices are parts of one CPU: memory counts, time does not"
    return lines | _left_out(args, (*programs.PEERS, programs.FLEX))


def _left_out(args: argparse.Namespace, peers: Sequence[str]) -> dict[str, str]:
    reasons: dict[str, list[str]] = {}
    for peer in peers:
        reason = programs.why_left_out(peer, args)
        if reason:
            reasons.setdefault(reason, []).append(peer)
    left_out = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    return {"left out": _below(*left_out)} if left_out else {}


def _below(*texts: str) -> str:
    """Under each other, where the header's texts begin."""
    return ("\n" + " " * 14).join(texts)


def print_all(
    console: Console, rows: Sequence[Row], describe: Callable, args: argparse.Namespace
) -> None:
    published = [row for row in rows if row["grid"] == "published"]
    by_name: dict[str, list[Row]] = {}
    for row in published:
        by_name.setdefault(row["implementation"], []).append(row)
    names = [*TITLES, *(name for name in by_name if name not in TITLES)]
    for name in names:
        if name in by_name:
            _print_published(console, name, by_name[name], args.backward)
    _print_real(console, [row for row in rows if row["grid"] == "real"])
    of_kernels = [row for row in rows if row["grid"] == "kernels"]
    kernels_report.print_rows(console, of_kernels, args.on_device)
    _print_slower(console, rows)
    errors = [row["error"] for row in rows if row["status"] == "ok"]
    if errors:
        more = f", gradients + {CANCELLATION:.0e}" if args.backward else ""
        console.print(
            "All results were checked against float64 before they were timed: errors "
            f"up to\n{max(errors):.1e}, each at most twice that of plain jnp{more}."
        )
    if any(row.get("includes_compile") for row in rows):
        console.print("* mean, without warm-up: the first call includes compile")
    print_problems(console, rows, describe)


def _print_published(
    console: Console, name: str, rows: list[Row], backward: bool
) -> None:
    title = f"{name}: {TITLES[name]}" if name in TITLES else name
    if rows[0]["by"] == "ring_attention":
        count = rows[0]["devices"]
        title += f" on {count} device{'s' * (count > 1)}"
    columns = ["", "ms", "± std", "ktok/s", "MiB"]
    if compared := name in TITLES and not backward:
        columns += ["published ms", "MiB", "ktok/s"]
    result = table(title, columns)
    for row in rows:
        cells = _time_cells(row) or [row["status"], "-", "-", "-"]
        if compared:
            cells += _published_cells(PUBLISHED[name, shape_of(row)])
        result.add_row(row["shape"], *cells)
    print_table(console, result)


def _time_cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return []
    mark = "*" if row["includes_compile"] else ""
    tokens = row["batch"] * row["seq"] / row["time_ms"]
    cells = [mark + number(row["time_ms"]), number(row["std_ms"], 2)]
    return [*cells, number(tokens), number(allocated_mib(row))]


def _published_cells(line: Published) -> list[str]:
    if line.time_ms is None or line.tokens_per_s is None:
        return ["failed (published)", "-", "-"]
    rate = number(line.tokens_per_s / 1e3)
    return [f"{line.time_ms:.2f}", number(line.net_mib), rate]


def shape_of(row: Row) -> Shape:
    return Shape(*(int(row[name]) for name in ("batch", "seq", "heads", "dim")))


def allocated_mib(row: Row) -> float | None:
    """Beside arguments; the same on each device."""
    if "temp_bytes" not in row:
        return None
    return (row["temp_bytes"] + row["output_bytes"]) / 2**20


def _print_real(console: Console, rows: Sequence[Row]) -> None:
    """By sequence; work and time are over those of dense attention."""
    if not rows:
        return
    tera = any(row.get("device_ms") for row in rows)
    unit, factor = ("TFLOP/s", 1) if tera else ("GFLOP/s", 1e3)
    sizes = f"batch {rows[0]['batch']}, {rows[0]['heads']} heads"
    title = f"{sizes}, dim 64; work and time: over those of attention"
    result = table(title, ["", "ms", "± std", unit, "MiB", "work", "time"])
    dense = {
        row["seq"]: row
        for row in rows
        if row["implementation"] == "attention" and row["status"] == "ok"
    }
    seq = None
    for row in rows:
        if row["seq"] != seq:
            seq = row["seq"]
            result.add_row(f"[bold]n = {seq}[/bold]")
        cells = _time_cells(row) or [row["status"], "-", "-", "-"]
        if row["status"] == "ok":
            cells[2] = number(factor * row["tflops"])
        work = row["flops"] / Task(shape_of(row), Dense()).flops(row["pass"])
        ratio = time_over(row, dense.get(row["seq"]))
        result.add_row(
            f" {row['implementation']}",
            *cells,
            f"{work:.3f}",
            "-" if ratio is None else f"{ratio:.2f}",
        )
    print_table(console, result)


def time_over(row: Row, other: Row | None) -> float | None:
    """How many times as long as the other; None where one of them has no time."""
    if row["status"] != "ok" or other is None or other["status"] != "ok":
        return None
    return row["time_ms"] / other["time_ms"]


def _plain_of(row: Row) -> str:
    """The row of plain jnp that computes the same; for blocks and rings a dense one."""
    name = row["implementation"]
    if row["grid"] == "real" and row["by"] == "dilated_attention":
        return f"{PLAIN} {name.removeprefix('dilated ')}"
    causal = row["grid"] == "real" and name.endswith("causal")
    return f"{PLAIN} causal" if causal else PLAIN


def slower_than_plain(rows: Sequence[Row]) -> dict[str, float]:
    """Our rows that take longer than plain jnp does, and how many times as long."""
    found = {(row["grid"], row["shape"], row["implementation"]): row for row in rows}
    slower = {}
    for row in rows:
        if row["by"] not in programs.OURS or "multihead" in row["implementation"]:
            continue
        other = found.get((row["grid"], row["shape"], _plain_of(row)))
        ratio = time_over(row, other)
        if ratio is not None and ratio > 1:
            slower[f"{row['implementation']} {row['shape']}"] = ratio
    return slower


def _print_slower(console: Console, rows: Sequence[Row]) -> None:
    if not any(row["by"] == PLAIN and row["status"] == "ok" for row in rows):
        return
    slower = slower_than_plain(rows)
    console.print(f"Slower than plain jnp: {len(slower) or 'none'} of our rows.")
    for name, ratio in slower.items():
        console.print(f"  {name}: {ratio:.2f} times its time", markup=False)
