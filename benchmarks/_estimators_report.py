"""Tables of `benchmarks.estimators`."""

import argparse
from collections.abc import Callable, Sequence

from rich.console import Console

from . import _estimators_definitions as definitions
from . import _estimators_model as model
from ._harness import Row
from ._report import number, print_problems, print_table, published, ratio, table

# What each is called in the published study.
TITLES = {"straight_through": "ste", "seed_reinmax": "reinmax"}
PUBLISHED = {
    (line["estimator"], line["implementation"], int(line["batch_size"])): line
    for line in published("estimators")
}
PASSES = ("forward", "backward")
# "fused" by the Hopper kernels; the other forms are XLA's.
KERNEL = "mosaic_gpu"
NAMES = {KERNEL: "kernel"}
BASE_PARAMETERS = 14_698_688
Found = dict[tuple[str, int, str, str], Row]


def _line(estimator: str, method: str, batch: int) -> dict[str, str] | None:
    return PUBLISHED.get((TITLES[estimator], method, batch))


def published_ms(
    estimator: str, method: str, batch: int, which: str = "total"
) -> float | None:
    line = _line(estimator, method, batch)
    if line is None:
        return None
    if which == "total":
        return float(line["forward_ms"]) + float(line["backward_ms"])
    return float(line[f"{which}_ms"])


def notes(args: argparse.Namespace) -> dict[str, str]:
    """Lines of the header."""
    seq, embed, hidden = args.layer_sizes
    whole = definitions.SEQ
    below = "\n" + " " * 14
    return {
        "layer": f"masked_bilinear, {embed} x {hidden}, {seq} tokens a sample: output"
        + f"{below}and all gradients (input, weights, biases, logits of both signs)",
        "model": f"3 layers, 14.7M parameters, {whole} tokens a sample, the first MLP"
        + f"{below}masked: loss, then the gradients of the mask logits",
        "current": "one mask for the whole batch, so of 1 sample",
        "reinmax": "the paper's; seed_reinmax is the rule published under its name",
        "kernel": "fused by mosaic_gpu; all other forms are XLA's",
        "loop": "over samples in the masked layer; published: through the network",
        "peak": "XLA's plan for results, what is kept for the backward, temporaries",
        "published": "PyTorch, float32, on a GPU not named; parameters are its memory",
    }


def print_all(
    console: Console, rows: Sequence[Row], describe: Callable, args: argparse.Namespace
) -> None:
    layer = [row for row in rows if row["part"] == "layer"]
    whole = [row for row in rows if row["part"] == "model"]
    if layer:
        _print_checks(console, layer)
        _print_layer(console, layer)
        print_predictions(console)
    found: Found = {
        (r["estimator"], r["batch"], r["implementation"], r["pass"]): r for r in whole
    }
    for estimator in TITLES:
        if any(key[0] == estimator for key in found):
            _print_times(console, found, estimator)
            _print_costs(console, found, estimator)
    errors = [row["error"] for row in whole if row["status"] == "ok"]
    if errors:
        console.print(
            "Losses of all tokens and gradients of all logits were checked against "
            f"float64\nbefore they were timed: errors up to {max(errors):.1e}, each at "
            "most twice that\nof plain jnp."
        )
    if any(row.get("includes_compile") for row in rows):
        console.print("* without warm-up: the first call includes compile")
    print_problems(console, rows, describe)


def _batches(rows: Sequence[Row]) -> list[int]:
    return sorted({row["batch"] for row in rows})


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["implementation"] for row in rows))


def _name(method: str) -> str:
    return NAMES.get(method, method)


def _print_checks(console: Console, rows: list[Row]) -> None:
    """Errors against float64 by method, and what they may be at most."""
    methods = _methods(rows)
    for estimator in definitions.ESTIMATORS:
        group = [row for row in rows if row["estimator"] == estimator]
        if not group:
            continue
        title = f"Equivalence, {estimator}: error of outputs and gradients"
        result = table(title, ["samples", *map(_name, methods), "allowed"])
        for batch in _batches(group):
            of = {r["implementation"]: r for r in group if r["batch"] == batch}
            cells = [_error(of.get(method)) for method in methods]
            bounds = [r["error_bound"] for r in of.values() if "error_bound" in r]
            allowed = f"{max(bounds):.1e}" if bounds else "-"
            result.add_row(f" {batch}", *cells, allowed)
        print_table(console, result)


def _error(row: Row | None) -> str:
    if row is None or "error" not in row:
        return "-" if row is None else row["status"]
    mark = "" if row["error"] <= row["error_bound"] else "WRONG "
    return f"{mark}{row['error']:.1e}"


def _print_layer(console: Console, rows: list[Row]) -> None:
    """Time and temporary memory of the layer alone, by method."""
    methods = _methods(rows)
    quantities = {
        "Layer, forward and all gradients: ms": _mean,
        "Layer, temporary memory: MiB": _temporaries,
    }
    for title, read in quantities.items():
        result = table(title, ["samples", *map(_name, methods)])
        for estimator in definitions.ESTIMATORS:
            group = [row for row in rows if row["estimator"] == estimator]
            if group:
                result.add_row(f"[bold]{estimator}[/bold]")
            for batch in _batches(group):
                of = {r["implementation"]: r for r in group if r["batch"] == batch}
                result.add_row(f" {batch}", *(read(of.get(m)) for m in methods))
        print_table(console, result)


def print_predictions(console: Console) -> None:
    """Of the published layer, whatever was measured."""
    sizes = definitions.SEQ, definitions.EMBED, definitions.HIDDEN
    for which in model.PASSES:
        title = f"Layer, {which}, straight_through: us on an H200, predicted"
        floors = list(model.floors_us(sizes, 1, which))
        result = table(title, ["samples", *floors, "our kernels"])
        for batch in (1, 2, 8, 16):
            cells = [number(us) for us in model.floors_us(sizes, batch, which).values()]
            ours = number(model.predicted_us(sizes, batch, which), 2)
            result.add_row(f" {batch}", *cells, ours)
        print_table(console, result)


def _temporaries(row: Row | None) -> str:
    size = (row or {}).get("temp_bytes")
    return number(None if size is None else size / 2**20)


def _ok(row: Row | None) -> bool:
    return row is not None and row["status"] == "ok"


def _mean(row: Row | None) -> str:
    if not row:
        return "-"
    if not _ok(row):
        return row["status"]
    return "*" * row["includes_compile"] + number(row["mean_ms"])


def total_ms(found: Found, estimator: str, batch: int, method: str) -> float | None:
    """Of forward and backward; None where one of them has no time."""
    passes = [found.get((estimator, batch, method, p)) for p in PASSES]
    times = [row["mean_ms"] for row in passes if row is not None and _ok(row)]
    return sum(times) if len(times) == 2 else None


def _groups(found: Found, estimator: str) -> dict[int, list[str]]:
    """Methods by batch."""
    groups: dict[int, dict[str, None]] = {}
    for name, batch, method, _ in found:
        if name == estimator:
            groups.setdefault(batch, {})[method] = None
    return {batch: list(methods) for batch, methods in sorted(groups.items())}


def _figure(value: float | None, digits: int = 3) -> str:
    """Not finer than a microsecond, which none of these times is to be read to."""
    text = number(value, digits)
    return f"{value:.3f}" if len(text.partition(".")[2]) > 3 else text


def _spread(row: Row | None) -> str:
    """Mean ± standard deviation, in a few columns of text whatever the figures."""
    if row is None or not _ok(row):
        return _mean(row)
    mark = "*" * row["includes_compile"]
    spread = "" if row["std_ms"] is None else f"±{_figure(row['std_ms'], 2)}"
    return f"{mark}{_figure(row['mean_ms'])}{spread}"


def _print_times(console: Console, found: Found, estimator: str) -> None:
    title = f"{estimator} (published: {TITLES[estimator]}), ms, mean ± std"
    columns = ["forward", "backward", "total"]
    theirs = ["publ. forw.", "backward", "total"]
    result = table(title, ["", *columns, *theirs])
    for batch, methods in _groups(found, estimator).items():
        result.add_row(f"[bold]batch {batch}[/bold]")
        for method in methods:
            passes = [found.get((estimator, batch, method, p)) for p in PASSES]
            cells = [_spread(row) for row in passes]
            cells.append(_figure(total_ms(found, estimator, batch, method)))
            line = _line(estimator, method, batch)
            if line:
                cells += [f"{line[f'{p}_ms']}±{line[f'{p}_std_ms']}" for p in PASSES]
                cells.append(f"{published_ms(estimator, method, batch):.2f}")
            result.add_row(f" {_name(method)}", *cells)
    print_table(console, result)


def parameters_mib(batch: int) -> float:
    """Of the base and of a mask set for each sample, as the study counts memory."""
    logits = 3 * definitions.EMBED * definitions.HIDDEN * batch
    return 4 * (BASE_PARAMETERS + logits) / 2**20


def peak_mib(found: Found, estimator: str, batch: int, method: str) -> float | None:
    """Over parameters: the larger one of forward and backward, which has what is kept.

    The gradients are among the results.
    """
    sizes = []
    for which in PASSES:
        row = found.get((estimator, batch, method, which))
        if row is None or not _ok(row) or "temp_bytes" not in row:
            return None
        kept = row.get("kept_bytes", 0)
        sizes.append((row["temp_bytes"] + row["output_bytes"] + kept) / 2**20)
    return max(sizes)


def _print_costs(console: Console, found: Found, estimator: str) -> None:
    title = f"{estimator}: a sample's time and speed-ups (published), memory in MiB"
    columns = ["ms/sample", "over current", "over loop", "parameters", "(publ.)"]
    result = table(title, ["", *columns, "peak"])
    current = total_ms(found, estimator, 1, "current")
    their_current = published_ms(estimator, "current", 1)
    for batch, methods in _groups(found, estimator).items():
        result.add_row(f"[bold]batch {batch}[/bold]")
        loop = total_ms(found, estimator, batch, "loop")
        their_loop = published_ms(estimator, "loop", batch)
        for method in methods:
            ms = total_ms(found, estimator, batch, method)
            theirs = published_ms(estimator, method, batch)
            line = _line(estimator, method, batch)
            result.add_row(
                f" {_name(method)}",
                number(ms and ms / batch),
                ratio(
                    current and ms and current / (ms / batch),
                    theirs and their_current and their_current / (theirs / batch),
                ),
                ratio(
                    loop and ms and loop / ms,
                    theirs and their_loop and their_loop / theirs,
                ),
                f"{parameters_mib(batch):.2f}",
                line["memory_mb"] if line else "-",
                number(peak_mib(found, estimator, batch, method)),
            )
    print_table(console, result)
