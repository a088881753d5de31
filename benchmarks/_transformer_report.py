"""Tables of `benchmarks.transformer`, in the order of the published report."""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from ._harness import Row
from ._report import number, print_problems, print_table, published, ratio, table

OURS = "jaxkern"
SHORT = {
    "forward": "forward",
    "forward+backward": "fwd+bwd",
    "optimizer step": "AdamW",
}
STARRED = "* the first of the timed calls compiles: its time is in mean and ± std"


def find_published(
    lines: Sequence[Mapping[str, str]], labels: Mapping[str, Any]
) -> Mapping[str, str] | None:
    """The line of our row, if there is one; peers and optimizer steps have none."""
    if labels["framework"] != OURS or labels["pass"] == "optimizer step":
        return None
    key = (
        labels["size"],
        str(labels["context"]),
        str(labels["batch"]),
        str(labels["warmup"]),
        "true" if labels["pass"] == "forward" else "false",
    )
    columns = "model_size", "context_length", "batch_size", "num_warmups"
    for line in lines:
        if tuple(line[c] for c in (*columns, "forward_only")) == key:
            return line
    return None


def timing_text(args: argparse.Namespace, default: int) -> str:
    counts = ", ".join(map(str, args.warmup))
    return f"{args.timing}, {args.iterations or default} calls after {counts} warm-ups"


def notes(args: argparse.Namespace, peak: float) -> dict[str, str]:
    model = f"{args.layers} layers, {args.attention} attention, {args.mlp}"
    model += ", rematerialized" if args.remat else ""
    model += f", on {args.mesh}" if args.mesh else ""
    rate = f"{1e3 * peak:.0f} GFLOP/s of a large matmul, measured in this run"
    return {
        "model": model,
        "100 % is": rate,
        "published": "PyTorch eager, float32, its GPU not named",
    }


def print_all(console: Console, rows: Sequence[Row], describe: Callable) -> None:
    good = [row for row in rows if row["status"] == "ok"]
    _print_complete(console, rows)
    ours = [row for row in good if row["framework"] == OURS]
    if len({row["size"] for row in ours}) > 1:
        _print_sizes(console, ours)
    _print_passes(console, good)
    _print_warmups(console, ours)
    _print_pivot(console, ours)
    _print_summary(console, ours)
    print_problems(console, rows, describe)


def _groups(rows: Sequence[Row], *labels: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[label] for label in labels), []).append(row)
    return groups


def _published(row: Row) -> tuple[float | None, float | None]:
    line = find_published(published("transformer"), row)
    if line is None:
        return None, None
    return float(line["mean_time_ms"]), float(line["std_time_ms"])


def _print_complete(console: Console, rows: Sequence[Row]) -> None:
    columns = ["ms", "± std", "publ.", "± std", "tok/s", "% peak", "MB", "comp. s"]
    result = table("Milliseconds: mean, sample std; w: warm-ups", ["", *columns])
    for (size, context), of_size in _groups(rows, "size", "context").items():
        result.add_row(f"[bold]{size}[/bold] {of_size[0]['batch']}x{context}")
        for (by,), group in _groups(of_size, "framework").items():
            if by != OURS:
                result.add_row(f" {by.removeprefix(OURS).strip()}")
            for row in group:
                name = f"  {SHORT[row['pass']]} w{row['warmup']}"
                result.add_row(name, *_cells(row))
    print_table(console, result)
    errors = [row["error"] for row in rows if row["status"] == "ok"]
    if errors:
        console.print(
            "Checked before timing: the loss against the plain form's, and at two "
            "layers all\ngradients against float64: errors up to "
            f"{max(errors):.1e}, each at most twice the plain\nform's. MB: arguments, "
            "results and intermediates; on a GPU its allocator's peak."
        )
    if any(row.get("includes_compile") for row in rows):
        console.print(STARRED)
    console.print()


def _cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [row["status"]]
    mark = "*" if row["includes_compile"] else ""
    mean, std = _published(row)
    # Of the median, but with compilation in it a rate says nothing.
    tokens = 1e3 * row["batch"] * row["context"] / row["time_ms"]
    steady = not row["includes_compile"]
    return [
        mark + number(row["mean_ms"], 4),
        number(row["std_ms"], 2),
        number(mean, 4),
        number(std, 2),
        number(tokens if steady else None, 4),
        number(row.get("percent_of_peak") if steady else None),
        number(_memory(row) / 1e6, 4),
        number(row.get("compile_s"), 2),
    ]


def _memory(row: Row) -> float:
    parts = "argument_bytes", "output_bytes", "temp_bytes"
    return row.get("peak_bytes") or sum(row.get(part, 0) for part in parts)


def _by_warmup(group: Sequence[Row]) -> dict[int, Row]:
    return {row["warmup"]: row for row in group}


def _warmups(rows: Sequence[Row]) -> list[int]:
    return sorted({row["warmup"] for row in rows})


def _print_sizes(console: Console, rows: Sequence[Row]) -> None:
    """One table a size: the same rows, warm-ups side by side."""
    warmups = _warmups(rows)
    for (size,), of_size in _groups(rows, "size").items():
        columns = [f"warm-up {n}" for n in warmups]
        title = f"{size}: mean ± std (published mean)"
        result = table(title, ["", *columns])
        for (context, what), group in _groups(of_size, "context", "pass").items():
            found = _by_warmup(group)
            cells = [_spread(found[n]) if n in found else "-" for n in warmups]
            result.add_row(f"{context} {SHORT[what]}", *cells)
        print_table(console, result)


def _spread(row: Row) -> str:
    text = f"{number(row['mean_ms'], 4)} ± {number(row['std_ms'], 2)}"
    mean, _ = _published(row)
    return text if mean is None else f"{text} ({number(mean, 4)})"


def _print_passes(console: Console, rows: Sequence[Row]) -> None:
    """Forward against forward and backward, at the largest warm-up of each."""
    passes = [p for p in SHORT if any(row["pass"] == p for row in rows)]
    if len(passes) < 2:
        return
    title = "Passes over the forward, after the most warm-ups (published)"
    others = [p for p in passes if p != "forward"]
    result = table(title, ["", "forward ms", *(SHORT[p] for p in others)])
    for (size, context, by), group in _groups(
        rows, "size", "context", "framework"
    ).items():
        most = max(_warmups(group))
        found = {row["pass"]: row for row in group if row["warmup"] == most}
        if "forward" not in found:
            continue
        base = found["forward"]
        cells = [_ratio(found.get(p), base) for p in others]
        peer = by.removeprefix(OURS).strip()
        mean = number(base["mean_ms"], 4)
        result.add_row(f"{size} {context} {peer}", mean, *cells)
    print_table(console, result)


def _ratio(top: Row | None, bottom: Row | None) -> str:
    if top is None or bottom is None:
        return "-"
    theirs = _published(top)[0], _published(bottom)[0]
    of_theirs = theirs[0] / theirs[1] if theirs[0] and theirs[1] else None
    return ratio(top["mean_ms"] / bottom["mean_ms"], of_theirs)


def _print_warmups(console: Console, rows: Sequence[Row]) -> None:
    """What each warm-up leaves of the time without any."""
    warmups = _warmups(rows)
    if len(warmups) < 2:
        return
    first, *others = warmups
    title = f"Effect of warm-ups: mean after {first} over mean after more (published)"
    result = table(title, ["", *(f"{first} over {n}" for n in others)])
    for (size, context, what), group in _groups(
        rows, "size", "context", "pass"
    ).items():
        found = _by_warmup(group)
        cells = [_ratio(found.get(first), found.get(n)) for n in others]
        result.add_row(f"{size} {context} {SHORT[what]}", *cells)
    print_table(console, result)


def _print_pivot(console: Console, rows: Sequence[Row]) -> None:
    """Means by size and warm-up, never mixing passes or contexts."""
    warmups = _warmups(rows)
    if len({row["size"] for row in rows}) < 2:
        return
    for (what, context), group in _groups(rows, "pass", "context").items():
        title = f"Mean ms of {SHORT[what]} at context {context} (published)"
        result = table(title, ["", *(f"warm-up {n}" for n in warmups)])
        for (size,), of_size in _groups(group, "size").items():
            found = _by_warmup(of_size)
            cells = [_mean(found[n]) if n in found else "-" for n in warmups]
            result.add_row(size, *cells)
        print_table(console, result)


def _mean(row: Row) -> str:
    mean, _ = _published(row)
    text = number(row["mean_ms"], 4)
    return text if mean is None else f"{text} ({number(mean, 4)})"


def _print_summary(console: Console, rows: Sequence[Row]) -> None:
    """The distribution of all means and of all standard deviations."""
    theirs = [figures for figures in map(_published, rows) if figures[0] is not None]
    columns = {
        "means": [row["mean_ms"] for row in rows],
        "stds": [row["std_ms"] for row in rows if row["std_ms"] is not None],
        "publ. means": [mean for mean, _ in theirs],
        "publ. stds": [std for _, std in theirs],
    }
    columns = {name: values for name, values in columns.items() if len(values) > 1}
    if not columns:
        return
    described = [_describe(values) for values in columns.values()]
    result = table(f"Summary of {len(rows)} rows, ms", ["", *columns])
    for name in described[0]:
        result.add_row(name, *(number(values[name], 4) for values in described))
    print_table(console, result)


def _describe(values: Sequence[Any]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values),
        "min": min(values),
        **dict(zip(("25 %", "50 %", "75 %"), quartiles, strict=True)),
        "max": max(values),
    }
