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
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

from jaxkern.nn import make_mesh, parse_mesh_sizes

from . import _report as report
from . import _transformer_memory as memory
from . import frame
from ._cli import DTYPES, names, positive, refuse, run_program
from ._figures import Figure, Panel, Point
from ._harness import BOTH, FORWARD, PLAIN, Case, Row, labels
from ._transformer_programs import ATTENTION, MLP, STEP, Layers, Pass, Size, Task, build

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
PASSES: tuple[Pass, ...] = (FORWARD, BOTH)
SHORT = {FORWARD: "forward", BOTH: "fwd+bwd", STEP: "AdamW"}
# The labels that name a row.
DESCRIBED = "size", "seq", "devices", "mesh", "pass", "warm-up warmup", "by", "layers"


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The rows of one model's weights follow each other."""
    if args.memory:
        return memory.cases()
    default = SIZES if args.full or args.on_device else ["small"]
    contexts = args.contexts or (CONTEXTS if args.full else CONTEXTS[:1])
    passes = [*PASSES, *([STEP] if args.optimizer else [])]
    cases = []
    for size in args.sizes or default:
        for by, layers in _computers(args):
            # A row beside ours, which is not published, has one warm-up, not every one.
            every = by != PLAIN and layers == args.layers
            warmups = args.warmups if every else [max(args.warmups)]
            cases += [
                _make_case(size, int(context), what, int(warmup), by, layers, args)
                for context in contexts
                for what in passes
                for warmup in warmups
            ]
    return cases


def _computers(args: argparse.Namespace) -> list[tuple[str, Layers]]:
    """Ours, and where peers are wanted those; a CPU has time for plain jnp only."""
    other: Layers = "unrolled" if args.layers == "scanned" else "scanned"
    rows: list[tuple[str, Layers]] = [(args.ours, args.layers)]
    if args.peers and (args.full or args.on_device):
        rows.append((args.ours, other))
    dense = (args.attention, args.mlp) == ("dense", "swiglu")
    if args.peers and dense and args.mesh is None:
        rows.append((PLAIN, "unrolled"))
    return rows


def _make_case(name, context, what, warmup, by, layers, args) -> Case:
    options = "batch", "attention", "mlp", "remat", "seed", "mesh"
    same = {option: getattr(args, option) for option in options}
    task = Task(SIZES[name], context, what=what, dtype=str(args.dtype), **same)
    # The devices that a CPU pretends to be share its cores, and the rate beside them.
    devices = jax.device_count() if args.mesh and args.on_device else 1
    form = args.attention, args.mlp
    variant = "" if form == ("dense", "swiglu") else ", ".join(form)
    sizes = {"size": name, "batch": args.batch, "seq": context}
    sizes |= {"layers": layers, "warmup": warmup}
    what_row = labels("TransformerLM", variant, by, what, args.dtype, **sizes)
    mean, _ = published_ms(what_row) if layers == args.layers else (None, None)
    trace = args.trace and args.trace / re.sub(r"\W+", "-", BENCHMARK.name_of(what_row))
    return Case(
        labels=what_row,
        build=partial(build, task, by, layers, trace),
        flops=task.flops() / devices,
        iterations=TRIALS if args.full or args.on_device else CPU_TRIALS,
        needed_bytes=task.needed_bytes(),
        published_ms=mean,
        warmup=warmup,
    )


@cache
def _lines() -> Mapping[tuple[str, ...], Mapping[str, str]]:
    columns = "model_size", "context_length", "batch_size", "num_warmups"
    lines = report.published("transformer")
    return {tuple(line[c] for c in (*columns, "forward_only")): line for line in lines}


def published_ms(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; peers and optimizer steps have none."""
    sizes = (str(row[label]) for label in ("size", "seq", "batch", "warmup"))
    line = _lines().get((*sizes, "true" if row["pass"] == FORWARD else "false"))
    if line is None or row["by"] == PLAIN or row["pass"] == STEP:
        return None, None
    return float(line["mean_time_ms"]), float(line["std_time_ms"])


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


def add_options(parser: argparse.ArgumentParser) -> None:
    # Rows differ in their warm-ups. As published: float32, each call waited for.
    add = parser.add_argument
    help_warmup = "calls before the clock starts, row by row (default 0,1; full 0,1,5)"
    add("--warmup", type=_warmups, dest="warmups", metavar="N,N", help=help_warmup)
    parser.set_defaults(timing="per-call")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
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
    help_memory = "bytes a device for a training step, compiled and not run"
    add("--memory", action="store_true", help=help_memory)


def start(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.warmup = 0
    if not args.memory:
        return
    models = "batch", "dtype", "mesh", "attention", "mlp", "sizes", "contexts", "layers"
    more = "remat", "optimizer", "full", "seed", "peers"
    refuse(parser, args, "--memory has its own models", *models, *more)
    clocks = "warmups", "iterations", "timing", "trace", "plot"
    refuse(parser, args, "--memory times nothing", *clocks)
    memory.start()


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.warmups is None:
        args.warmups = [*(WARMUPS if args.full else DEFAULT_WARMUPS)]
    args.layers = args.layers or ("scanned" if args.on_device else "unrolled")
    if args.mesh is None or args.memory:
        return
    # A mesh that it cannot share is refused before anything is computed.
    try:
        make_mesh(**parse_mesh_sizes(args.mesh))
        for case in make_cases(args):
            row: Any = case.build
            row.args[0].trace(args.layers)
    except ValueError as error:
        parser.error(f"--mesh: {error}")


def notes(args: argparse.Namespace) -> dict[str, str]:
    if args.memory:
        return memory.NOTES
    model = f"{args.layers} layers, {args.attention} attention, {args.mlp}"
    model += ", rematerialized" if args.remat else ""
    model += f", on {args.mesh}" if args.mesh else ""
    return {
        "model": model,
        "% peak": "of the rate of the large matmul",
        "published": "PyTorch eager, float32, its GPU not named",
        "checked": "the loss against the plain form's; at two layers all gradients",
        "MB": "arguments, results and intermediates; on a GPU its allocator's peak",
    }


def tables(rows: Sequence[Row], meta: frame.Meta) -> Iterator[report.Table]:
    if "mesh" in rows[0]:
        yield memory.table(rows)
        return
    good = [row for row in rows if row["status"] == "ok"]
    yield _complete(rows)
    # The published rows, those of one way to run the layers.
    ours = [row for row in good if _is_ours(row, rows[0])]
    several = len({row["size"] for row in ours}) > 1
    if several:
        for (size,), group in report.grouped(ours, "size").items():
            title = f"{size}: mean ± std (published mean)"
            yield report.pivot(title, group, _context_and_pass, _warmup, _spread)
    yield from _passes(good)
    yield from _effect_of_warmups(ours)
    if several:
        for (what, context), group in report.grouped(ours, "pass", "seq").items():
            title = f"Mean ms of {SHORT[what]} at context {context} (published)"
            yield report.pivot(title, group, lambda row: row["size"], _warmup, _mean)
    yield from _summary(ours)


def _is_ours(row: Row, first: Row) -> bool:
    return (row["by"], row["layers"]) == (first["by"], first["layers"])


def _warmup(row: Row) -> str:
    return f"warm-up {row['warmup']}"


def _context_and_pass(row: Row) -> str:
    return f"{row['seq']} {SHORT[row['pass']]}"


def _four(value: float | None) -> str:
    return report.number(value, 4)


def _complete(rows: Sequence[Row]) -> report.Table:
    # A rate says nothing where compilation is in the time.
    def steadily(read):
        return lambda row: "-" if row.get("includes_compile") else read(row)

    def tokens(row: Row) -> str:
        return _four(report.over(1e3 * row["batch"] * row["seq"], row.get("time_ms")))

    columns = {
        "ms": report.field("mean_ms", 4, starred=True),
        "± std": report.field("std_ms", 2),
        "publ.": lambda row: _four(published_ms(row)[0]),
        "±": lambda row: report.number(published_ms(row)[1], 2),
        "tok/s": steadily(tokens),
        "% peak": steadily(report.field("percent_of_peak")),
        "MB": lambda row: _four(_memory_mb(row)),
        "comp. s": report.field("compile_s", 2),
    }
    return report.listing(
        "Milliseconds: mean, sample std; w: warm-ups",
        rows,
        lambda row: f"{SHORT[row['pass']]} w{row['warmup']}",
        columns,
        lambda row: f"{_shape(row)} {row['by']}, {row['layers']}",
    )


def _shape(row: Row) -> str:
    return f"{row['size']} {row['batch']}x{row['seq']}"


def _memory_mb(row: Row) -> float | None:
    parts = "argument_bytes", "output_bytes", "temp_bytes"
    found = row.get("peak_bytes") or sum(row.get(part, 0) for part in parts)
    return found / 1e6 if found else None


def _spread(row: Row) -> str:
    return _mean(row, f" ± {report.number(row['std_ms'], 2)}")


def _mean(row: Row, spread: str = "") -> str:
    mean, _ = published_ms(row)
    text = f"{_four(row['mean_ms'])}{spread}"
    return text if mean is None else f"{text} ({_four(mean)})"


def _ratio(top: Row | None, bottom: Row | None) -> str:
    if top is None or bottom is None:
        return "-"
    theirs = report.over(published_ms(top)[0], published_ms(bottom)[0])
    return report.ratio(top["mean_ms"] / bottom["mean_ms"], theirs)


def _passes(rows: Sequence[Row]) -> Iterator[report.Table]:
    """Forward against forward and backward, at the largest warm-up of each."""
    others = [p for p in (BOTH, STEP) if any(row["pass"] == p for row in rows)]
    lines = []
    for _, group in report.grouped(rows, "size", "seq", "by", "layers").items():
        most = max(row["warmup"] for row in group)
        found = {row["pass"]: row for row in group if row["warmup"] == most}
        if FORWARD in found:
            base = found[FORWARD]
            name = f"{_shape(base)} {base['by']}, {base['layers']}"
            cells = [_ratio(found.get(p), base) for p in others]
            lines.append([name, _four(base["mean_ms"]), *cells])
    if others and lines:
        title = "Passes over the forward, after the most warm-ups (published)"
        columns = "", "forward ms", *(SHORT[which] for which in others)
        yield report.Table(title, columns, lines)


def _effect_of_warmups(rows: Sequence[Row]) -> Iterator[report.Table]:
    """Times without any warm-up, over those after some."""
    warmups = sorted({row["warmup"] for row in rows})
    if len(warmups) < 2:
        return
    first, *others = warmups
    lines = []
    for _, group in report.grouped(rows, "size", "seq", "pass").items():
        found = {row["warmup"]: row for row in group}
        cells = [_ratio(found.get(first), found.get(n)) for n in others]
        lines.append([f"{group[0]['size']} {_context_and_pass(group[0])}", *cells])
    title = f"Effect of warm-ups: mean after {first} over mean after more (published)"
    yield report.Table(title, ["", *(f"{first} over {n}" for n in others)], lines)


def _summary(rows: Sequence[Row]) -> Iterator[report.Table]:
    """The distribution of all means and of all standard deviations."""
    theirs = [published_ms(row) for row in rows]
    columns = {
        "means": [row["mean_ms"] for row in rows],
        "stds": [row["std_ms"] for row in rows],
        "publ. means": [mean for mean, _ in theirs],
        "publ. stds": [std for _, std in theirs],
    }
    known = {n: [x for x in xs if x is not None] for n, xs in columns.items()}
    known = {name: values for name, values in known.items() if len(values) > 1}
    described = [_describe(values) for values in known.values()]
    if described:
        lines = [[k, *(_four(d[k]) for d in described)] for k in described[0]]
        yield report.Table(f"Summary of {len(rows)} rows, ms", ["", *known], lines)


def _describe(values: Sequence[Any]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values),
        "min": min(values),
        **dict(zip(("25 %", "50 %", "75 %"), quartiles, strict=True)),
        "max": max(values),
    }


def figure(rows: Sequence[Row], meta: frame.Meta) -> Figure | None:
    """Tokens a second after the most warm-ups, by size; a panel a pass."""
    rows = [r for r in rows if r.get("time_ms") and not r["includes_compile"]]
    on_gpu, panels = meta["platform"] == "gpu", []
    for (what,), group in report.grouped(rows, "pass").items():
        places = list(dict.fromkeys(_shape(row) for row in group))
        series: dict[str, list[Point]] = {}
        theirs: dict[str, list[Point]] = {}
        for _, of_one in report.grouped(group, "size", "seq", "by", "layers").items():
            row = max(of_one, key=lambda row: row["warmup"])
            x, tokens = places.index(_shape(row)), 1e3 * row["batch"] * row["seq"]
            rate = tokens / row["time_ms"]
            spread = rate * (row["std_ms"] or 0) / row["time_ms"]
            name = f"{row['by']}, {row['layers']}"
            series.setdefault(name, []).append(Point(x, rate, spread))
            mean, _ = published_ms(row)
            if on_gpu and mean and _is_ours(row, rows[0]):
                theirs.setdefault(name, []).append(Point(x, tokens / mean))
        x, y = "size, batch x context", "tokens a second"
        panels.append([Panel(what, x, y, series, places, outlined=theirs)])
    outlined = "published (GPU not named)" if on_gpu else ""
    return Figure(panels, outlined=outlined) if panels else None


BENCHMARK = frame.Benchmark(
    name="transformer",
    question=__doc__ or "",
    cases=make_cases,
    tables=tables,
    describe=DESCRIBED,
    options=add_options,
    start=start,
    settle=settle,
    notes=notes,
    figure=figure,
    cpu_peak=True,
)
main = partial(frame.main, BENCHMARK)


if __name__ == "__main__":
    run_program(main)
