"""Do the forms of a per-sample weight mask agree, and what do they cost?

    python -m benchmarks.estimators         checks, then the published rows; on a CPU to
                                            8 samples
    python -m benchmarks.estimators --full  to 16 samples, on a CPU too
    python -m benchmarks.estimators --study bias and variance of the estimators

The published study (PyTorch, float32, on a GPU it does not name) trains masks of the
first MLP of a transformer, a mask a sample, and times forward (with the loss) and
backward (of the masks) apart: --warmup 3 --iterations 10 --timing per-call.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import jax

from jaxkern._masked.forms import Method
from jaxkern.testing import plain

from . import _estimators_definitions as definitions
from . import _estimators_study as study
from . import _report as report
from . import frame
from ._cli import refuse, run_program
from ._figures import Figure, Panel, Point
from ._h200 import floors_us as floors_of
from ._harness import BACKWARD, BOTH, FORWARD, KERNEL, XLA, Case, Program, Row, labels

LAYER, MODEL = "masked_bilinear", "QuadraticTransformer"
# The kernels compute what the method "fused" does by XLA.
FORMS = (*get_args(Method), "kernel")
PASSES = FORWARD, BACKWARD
BATCHES, CPU_BATCHES = (1, 2, 8, 16), (1, 2, 8)
ITERATIONS, CPU_ITERATIONS = 10, 3
# A CPU computes that part of the tokens and widths, to end within two minutes.
CPU_PART = 2
# Long calls on a CPU: of so many samples.
LONG, LONG_ITERATIONS = 8, 2
# Peaks that were observed, in MiB: of the float64 check of the layer and, for each
# sample, of its masks and gradients; the same of the model.
LAYER_MIB, MODEL_MIB = (300, 400), (1000, 250)
# The name of each estimator in the published study.
TITLES = {"straight_through": "ste", "one_plus_sigmoid": "reinmax"}
PUBLISHED = {
    (line["estimator"], line["implementation"], int(line["batch_size"])): line
    for line in report.published("estimators")
}
STUDIED = "loss", "logits to logits", "temperature temperature"
BASE_PARAMETERS = 14_698_688


def build_layer(estimator: str, form, batch: int, args) -> Program:
    """Output and all gradients of `masked_bilinear`."""
    key = args.seed, batch, args.layer_sizes, args.dtype
    inputs = definitions.layer_inputs(*key)

    def check(run):
        return definitions.expected_layer(estimator, *key)(run(*inputs))

    def figures() -> Row:
        return {"floors_us": floors_us(args.layer_sizes, batch)}

    run = plain.with_gradients(definitions.layer(estimator, form))
    return Program(run, inputs, check, figures=figures, warmed=1, ours=True)


def build_model(estimator: str, form, batch: int, which: str, args) -> Program:
    key = estimator, form, batch, args.seed, args.dtype
    passes = definitions.make_passes(*key)
    expected = estimator, which, args.seed, batch, max(args.batches), args.dtype
    if which == FORWARD:
        check = partial(definitions.check_forward, passes, expected)
        return Program(passes.forward, passes.args, check, warmed=1, ours=True)
    passes.run_forward()
    kept, passes.kept = passes.kept, None
    inputs = kept, *passes.args
    check = partial(definitions.check_backward, inputs, batch, expected)
    size = sum(x.nbytes for x in jax.tree.leaves(kept))
    figures = partial(dict, kept_bytes=size)
    return Program(passes.backward, inputs, check, figures=figures, warmed=1)


def make_cases(args: argparse.Namespace) -> list[Case]:
    if args.study:
        return study.cases(args.seed)
    cases = [
        _make_case(LAYER, estimator, batch, form, BOTH, args)
        for batch in args.batches
        for estimator in definitions.ESTIMATORS
        for form in FORMS
    ]
    cases += [
        _make_case(MODEL, estimator, batch, form, which, args)
        for estimator in TITLES
        for batch in args.batches
        for form in ("current", *FORMS)
        if form != "current" or batch == 1
        for which in PASSES
    ]
    return cases


def _make_case(op: str, estimator: str, batch: int, form, which: str, args) -> Case:
    by, method = (KERNEL, "fused") if form == "kernel" else (XLA, form)
    if op == LAYER:
        build = partial(build_layer, estimator, form, batch, args)
        (fixed, each), most, published = LAYER_MIB, batch, None
    else:
        build = partial(build_model, estimator, form, batch, which, args)
        (fixed, each), most = MODEL_MIB, max(args.batches)
        published = published_ms(estimator, form, batch, which)
    iterations = ITERATIONS
    if not args.whole:
        iterations = LONG_ITERATIONS if batch >= LONG else CPU_ITERATIONS
    sizes = {"method": method, "batch": batch}
    return Case(
        labels(op, estimator, by, which, args.dtype, **sizes),
        build,
        iterations=iterations,
        needed_bytes=2**20 * (fixed + each * most),
        published_ms=published,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    help_study = "the estimators' gradients against the exact ones; no times"
    parser.add_argument("--study", action="store_true", help=help_study)


def start(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    refuse(parser, args, "all rows are ours", "peers")
    if args.study:
        refuse(parser, args, "--study has no other size", "full")
        refuse(parser, args, "--study is in float32", "dtype")
        refuse(parser, args, "--study times nothing", "warmup", "iterations", "timing")
        args.dtype = "float32"


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.whole = args.on_device or args.full
    args.batches = BATCHES if args.whole else CPU_BATCHES
    part = 1 if args.whole else CPU_PART
    sizes = definitions.SEQ, definitions.EMBED, definitions.HIDDEN
    args.layer_sizes = tuple(size // part for size in sizes)


def _line(estimator: str, form: str, batch: int) -> dict[str, str]:
    return PUBLISHED.get((TITLES.get(estimator, ""), form, batch), {})


def published_ms(estimator: str, form: str, batch: int, *which: str) -> float | None:
    """The published time of these passes, or of both together."""
    line = _line(estimator, form, batch)
    return sum(float(line[f"{x}_ms"]) for x in which or PASSES) if line else None


def notes(args: argparse.Namespace) -> dict[str, str]:
    if args.study:
        text = f"{study.DRAWS} a row, of {study.ENTRIES} Bernoulli entries"
        return {"draws": text}
    seq, embed, hidden = args.layer_sizes
    return {
        "layer": f"masked_bilinear, {embed} x {hidden}, {seq} tokens a sample: output\n"
        "and all gradients (input, weights, biases, logits of both signs)",
        "model": f"3 layers, 14.7M parameters, {definitions.SEQ} tokens a sample, the "
        "first MLP\nmasked: loss, then the gradients of the mask logits",
        "current": "one mask for the whole batch, so of 1 sample",
        "reinmax": "the paper's; one_plus_sigmoid is published under its name",
        "kernel": "fused by mosaic_gpu; all other forms are XLA's",
        "loop": "over samples in the masked layer; published: through the network",
        "peak": "XLA's plan for results, what is kept for the backward, temporaries",
        "published": "PyTorch, float32, on a GPU not named; parameters are its memory",
    }


def form_of(row: Row) -> str:
    return "kernel" if row["by"] == KERNEL else row["method"]


def tables(rows: Sequence[Row], meta: frame.Meta) -> Iterator[report.Table | str]:
    if "loss" in rows[0]:
        yield from study.tables(rows)
        return
    layer = [row for row in rows if row["op"] == LAYER]
    if layer:
        yield from _layer_tables(layer)
    for (estimator,), group in report.grouped(rows, "variant").items():
        group = [row for row in group if row["op"] == MODEL]
        if group:
            yield _times(estimator, group)
            yield _costs(estimator, group)
    if layer:
        yield floors(sorted({row["batch"] for row in layer}))


def _layer_tables(rows: Sequence[Row]) -> Iterator[report.Table]:
    """Errors against float64, then time and temporary memory, by form."""

    def error(row: Row) -> str:
        return f"{row['error']:.1e}"

    def allowed(found: Mapping[str, Row]) -> str:
        bounds = [r["error_bound"] for r in found.values() if "error_bound" in r]
        return f"{max(bounds):.1e}" if bounds else "-"

    def pivot(title: str, cell: report.Read, **more: Any) -> report.Table:
        samples, head = (lambda row: str(row["batch"])), (lambda row: row["variant"])
        return report.pivot(title, rows, samples, form_of, cell, more, head)

    title = "Layer, forward and all gradients"
    yield pivot(f"{title}: error of outputs and gradients", error, allowed=allowed)
    yield pivot(f"{title}: ms", _mean)
    mib = report.field("temp_bytes", scale=2**-20)
    yield pivot("Layer, temporary memory: MiB", mib)


def _fine(value: float | None, digits: int = 3) -> str:
    """Not finer than a microsecond, to which none of these times is to be read."""
    text = report.number(value, digits)
    return f"{value:.3f}" if len(text.partition(".")[2]) > 3 else text


def _mean(row: Row) -> str:
    return "*" * row["includes_compile"] + _fine(row["mean_ms"])


def _spread(row: Row) -> str:
    """Mean ± standard deviation."""
    spread = "" if row["std_ms"] is None else f"±{_fine(row['std_ms'], 2)}"
    return f"{_mean(row)}{spread}"


Passes = Mapping[str, Row]


def _by_form(rows: Sequence[Row]) -> Mapping[tuple[int, str], Passes]:
    """The rows by batch and form, then by pass, smaller batches first."""
    ordered = sorted(rows, key=lambda row: row["batch"])
    groups = report.grouped(ordered, "batch", form_of).items()
    return {key: {row["pass"]: row for row in group} for key, group in groups}


def total_ms(passes: Passes | None) -> float | None:
    """Forward and backward together; None where one of them has no time."""
    times = [r["mean_ms"] for r in (passes or {}).values() if r["status"] == "ok"]
    return sum(times) if len(times) == len(PASSES) else None


def peak_mib(passes: Passes) -> float | None:
    """The larger one of forward and backward, which has what is kept.

    The gradients are among the results.
    """
    sizes = [report.allocated_mib(r) for r in passes.values() if r["status"] == "ok"]
    known = [size for size in sizes if size is not None]
    return max(known) if len(known) == len(PASSES) else None


def _lines(rows: Sequence[Row], cells) -> list[list[str]]:
    return report.headed(
        (f"batch {batch}", [form, *cells(batch, form, passes)])
        for (batch, form), passes in _by_form(rows).items()
    )


def _times(estimator: str, rows: Sequence[Row]) -> report.Table:
    def cells(batch: int, form: str, passes: Passes) -> list[str]:
        ours = [report.status_or(_spread, passes.get(p)) for p in PASSES]
        shown = [*ours, _fine(total_ms(passes))]
        line = _line(estimator, form, batch)
        if line:
            shown += [f"{line[f'{p}_ms']}±{line[f'{p}_std_ms']}" for p in PASSES]
            shown.append(f"{published_ms(estimator, form, batch):.2f}")
        return shown

    title = f"{estimator} (published: {TITLES[estimator]}), ms, mean ± std"
    columns = [FORWARD, BACKWARD, "total", "publ. forw.", BACKWARD, "total"]
    return report.Table(title, ["", *columns], _lines(rows, cells))


def parameters_mib(batch: int) -> float:
    """MiB of the base and of a mask set for each sample, as the study counts memory."""
    logits = 3 * definitions.EMBED * definitions.HIDDEN * batch
    return 4 * (BASE_PARAMETERS + logits) / 2**20


def _costs(estimator: str, rows: Sequence[Row]) -> report.Table:
    found = _by_form(rows)

    def cells(batch: int, form: str, passes: Passes) -> list[str]:
        ms, published = total_ms(passes), published_ms(estimator, form, batch)

        def over(other: str, samples: int) -> str:
            """The time of as many samples in another form, over that of this one."""
            times = total_ms(found.get((samples, other))), ms
            theirs = published_ms(estimator, other, samples), published
            quotients = (report.over(*pair) for pair in (times, theirs))
            return report.ratio(*(q and batch / samples * q for q in quotients))

        return [
            report.number(ms and ms / batch),
            over("current", 1),
            over("loop", batch),
            f"{parameters_mib(batch):.2f}",
            _line(estimator, form, batch).get("memory_mb", "-"),
            report.number(peak_mib(passes)),
        ]

    title = f"{estimator}: a sample's time and speed-ups (published), memory in MiB"
    columns = "ms/sample", "over current", "over loop", "parameters", "(publ.)", "peak"
    return report.Table(title, ["", *columns], _lines(rows, cells))


def floors_us(sizes: definitions.Sizes, batch: int) -> dict[str, float]:
    """Floors of the layer's output and all gradients, in 16 bits; logits in float32.

    Each argument is read and each result written once. A batched product, as "bmm",
    also writes its masked weights, and reads them for two products.
    """
    seq, embed, hidden = sizes
    weights, tokens = 3 * embed * hidden, batch * seq * embed
    # Each of three products has y = x W, dx = dy W^T and x^T dy.
    flops = 3 * 2.0 * batch * seq * weights
    moved = 2 * (4 * tokens + 2 * weights) + 2 * 4 * batch * weights
    stored = {"stored masks": floors_of(0, moved + 6 * batch * weights)["bytes"]}
    return floors_of(flops, moved) | stored


def floors(batches: Sequence[int]) -> report.Table:
    """The floors of the published layer, of which a CPU computes a part."""
    sizes = definitions.SEQ, definitions.EMBED, definitions.HIDDEN
    found = {str(batch): floors_us(sizes, batch) for batch in batches}
    lines = [[name, *map(report.number, us.values())] for name, us in found.items()]
    title = "Layer, forward and all gradients: floors of one H200 in us by matmuls "
    title += "(tensor), bytes moved, and those with masks in memory (stored masks)"
    return report.Table(title, ["samples", *floors_us(sizes, 1)], lines, predicted=True)


def figure(rows: Sequence[Row], meta: frame.Meta) -> Figure | None:
    """A panel of times and one of memory for each estimator, a line a form."""
    if rows and "loss" in rows[0]:
        return study.figure(rows)
    rows = [row for row in rows if row["op"] == MODEL and report.steady(row)]
    quantities: dict[str, Any] = {"ms, forward and backward": total_ms}
    quantities["MiB, peak"] = peak_mib
    x = "samples, each with its masks (log scale)"
    grid = []
    for y, read in quantities.items():
        line = []
        for (estimator,), group in report.grouped(rows, "variant").items():
            series: dict[str, list[Point]] = {}
            for (batch, form), passes in _by_form(group).items():
                value, spread = read(passes), None
                if read is total_ms:
                    stds = [row["std_ms"] or 0 for row in passes.values()]
                    spread = sum(std**2 for std in stds) ** 0.5
                if value is not None:
                    series.setdefault(form, []).append(Point(batch, value, spread))
            y_log = f"{y} (log scale)"
            if series:
                line.append(Panel(estimator, x, y_log, series, log_x=True, log_y=True))
        if line:
            grid.append(line)
    return Figure(grid) if grid else None


BENCHMARK = frame.Benchmark(
    name="estimators",
    question=__doc__ or "",
    cases=make_cases,
    tables=tables,
    describe=("op", "variant", "batch", "by", "method", *STUDIED, "pass"),
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
