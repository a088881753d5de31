"""The frame of all benchmarks: a `Benchmark` says what to measure and how to show it.

To add a benchmark, write one file beside this one, of about 150 lines:

1. Its docstring is the question that it answers, then the commands that answer it.
2. `cases(args)` lists the rows to measure, in order. A `Case` has `labels(op, variant,
   by, which, dtype, **sizes)`, which tell its row from all others, and a `build` that
   makes a `Program`: a function, its arguments and the check of its values. A wrong
   program is refused and never timed. A case of figures that need no clock builds a
   dict of them instead. `Skip` ends a row that cannot be measured here.
3. `tables(rows, meta)` yields one `Table` after the other: `listing` makes one with a
   line a row, `pivot` one with rows side by side. Figures of a model are in tables of
   their own, with `predicted=True`. A string among them is a line of text.
4. `figure(rows, meta)` returns the `Figure` that `--plot` draws, or None.
5. `notes(args)` are further lines of the header, and `options(parser)` adds options.

        BENCHMARK = Benchmark(
            name="softmax",
            question=__doc__ or "",
            cases=cases,
            tables=tables,
            describe=("op", "shape", "by"),
        )

        main = partial(frame.main, BENCHMARK)

        if __name__ == "__main__":
            run_program(main)

The frame then has all options, refuses wrong ones before anything runs, shows progress,
saves rows as they come, keeps them after an interrupt, and prints and draws them.
Tables and figures know only rows and metadata, so that `markdown` makes a page of a
saved file: the rows need not be measured again.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from . import _figures, _report
from ._cli import make_parser
from ._figures import Figure
from ._harness import PICKED, XLA, Case, Options, Row, matmul_peak_tflops, run

Meta = Mapping[str, Any]
Parser = argparse.ArgumentParser


@dataclass(frozen=True)
class Benchmark:
    """The rows of one benchmark, and how they are shown.

    Attributes:
        name: Of its module, and of its rows in saved files.
        question: The question in one line, then the commands.
        cases: The rows to measure.
        tables: Tables and lines of text, from rows and metadata.
        describe: The labels by which `--list` names a row and `--only` finds it, each
            the last word of its text: "warm-up warmup".
        options: Adds options of its own.
        start: Sees the arguments before JAX has looked for devices.
        settle: Completes the arguments and refuses what does not go together.
        notes: Lines of the header.
        figure: What `--plot` draws.
        cpu_peak: Whether the rate of a large matmul is measured on a CPU too.
        cpu_warmup: Warm-up calls on a CPU; elsewhere they are 5.
    """

    name: str
    question: str
    cases: Callable[[argparse.Namespace], list[Case]]
    tables: Callable[[Sequence[Row], Meta], Iterable[_report.Table | str]]
    describe: Sequence[str]
    options: Callable[[Parser], object] = lambda parser: None
    start: Callable[[Parser, argparse.Namespace], object] = lambda parser, args: None
    settle: Callable[[Parser, argparse.Namespace], object] = lambda parser, args: None
    notes: Callable[[argparse.Namespace], dict[str, str]] = lambda args: {}
    figure: Callable[[Sequence[Row], Meta], Figure | None] = lambda rows, meta: None
    cpu_peak: bool = False
    cpu_warmup: int = 5

    def name_of(self, row: Mapping[str, Any]) -> str:
        """A row in words, by which it is told from the others."""
        parts = []
        for entry in self.describe:
            *words, label = entry.split()
            if row.get(label) not in ("", None):
                parts += [*words, str(row[label])]
        return " ".join(parts)


def parse(benchmark: Benchmark, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, complete; `args.cases` are the rows to measure."""
    question = benchmark.question.replace(
        f"python -m benchmarks.{benchmark.name}", _report.program(benchmark.name)
    )
    parser = make_parser(_report.program(benchmark.name), question)
    benchmark.options(parser)
    args = parser.parse_args(argv)
    benchmark.start(parser, args)
    args.on_device = jax.default_backend() != "cpu"
    args.ours = PICKED if args.on_device else XLA
    args.dtype = args.dtype or ("bfloat16" if args.on_device else "float32")
    if args.warmup is None:
        args.warmup = 5 if args.on_device else benchmark.cpu_warmup
    args.dtype = jnp.dtype(args.dtype)
    benchmark.settle(parser, args)
    found = [
        case
        for case in benchmark.cases(args)
        if re.search(args.only, benchmark.name_of(case.labels))
    ]
    if not found:
        parser.error(f"--only must be found in a row of --list, got {args.only!r}")
    args.cases = found
    return args


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """Run a benchmark's command.

    Returns:
        The exit status: 130 after an interrupt, 1 if a row failed or the rows could not
        be saved.
    """
    args = parse(benchmark, argv)
    if args.list:
        print("\n".join(benchmark.name_of(case.labels) for case in args.cases))
        return 0
    # On a GPU float32 would silently be tf32.
    precision = "highest" if args.dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        return _run(benchmark, args, precision)


def _run(benchmark: Benchmark, args: argparse.Namespace, precision: str) -> int:
    meta = _report.metadata(
        benchmark.name,
        dtype=str(args.dtype),
        matmul_precision=precision,
        seed=args.seed,
        matmul_peak_tflops=matmul_peak_tflops(args.dtype, benchmark.cpu_peak),
        timing_text=timing_text(args),
        notes=benchmark.notes(args),
    )
    console = _report.make_console()
    _report.print_header(console, benchmark.question.splitlines()[0], meta)
    options = Options(args.warmup, args.iterations, args.timing)
    results, complete = measure(benchmark, args.cases, options, meta, args.json)
    saved = results.end(complete)
    for part in report(benchmark, results.rows, meta):
        if isinstance(part, _report.Table):
            _report.print_table(console, part)
        else:
            _report.print_text(console, part)
    if args.plot:
        figure = benchmark.figure(results.rows, meta)
        if figure is None:
            console.print(_figures.NOTHING)
        else:
            _figures.draw(figure, args.plot, meta)
    if not complete:
        done, all_rows = len(results.rows), len(args.cases)
        console.print(f"Interrupted after {done} of {all_rows} rows.")
        return 130
    failed = any(row["status"] == "failed" for row in results.rows)
    return int(failed or not saved)


def timing_text(args: argparse.Namespace) -> str:
    """How often each row is called, before and while the clock runs."""
    calls = sorted({args.iterations or case.iterations for case in args.cases})
    warmups = {args.warmup if c.warmup is None else c.warmup for c in args.cases}
    counts = f"{calls[0]}" if len(calls) == 1 else f"{calls[0]} to {calls[-1]}"
    before = ", ".join(map(str, sorted(warmups)))
    plural = "s" * (warmups != {1})
    return f"{args.timing}, {counts} calls after {before} warm-up{plural}"


def measure(
    benchmark: Benchmark,
    cases: Sequence[Case],
    options: Options,
    meta: Meta,
    json_path: Path | None,
) -> tuple[_report.Results, bool]:
    """Run the cases with progress, saving row by row; an interrupt ends them early.

    Returns:
        The rows that were measured, and whether those are all.
    """
    results = _report.Results(json_path, meta)
    complete = True
    with _report.RowProgress(len(cases), benchmark.name_of) as progress:

        def on_row(row: Row) -> None:
            results.add(row)
            progress.finish(row)

        try:
            run(
                cases,
                options,
                peak_tflops=meta["matmul_peak_tflops"],
                on_start=progress.start,
                on_row=on_row,
            )
        except KeyboardInterrupt:
            complete = False
    return results, complete


def report(
    benchmark: Benchmark, rows: Sequence[Row], meta: Meta
) -> Iterable[_report.Table | str]:
    """The benchmark's tables, then what holds for all rows, then what went wrong."""
    if rows:
        yield from benchmark.tables(rows, meta)
    errors = [r["error"] for r in rows if r["status"] == "ok" and "error" in r]
    if errors:
        yield (
            "All results were checked against float64 before they were timed: errors "
            f"up to\n{max(errors):.1e}, each within its bound, twice that of the plain "
            "form."
        )
    if any(row.get("includes_compile") for row in rows):
        yield "* mean of all timed calls, the first of which compiles"
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.get("device_ms_reason"):
            reason = f"no device time: {row['device_ms_reason']}"
            by_reason.setdefault(reason, []).append(benchmark.name_of(row))
        if row["status"] != "ok":
            reason = f"{row['status']}: {row['reason']}"
            by_reason.setdefault(reason, []).append(benchmark.name_of(row))
    for reason, (name, *more) in by_reason.items():
        others = f" and {len(more)} more row{'s' * (len(more) > 1)}" if more else ""
        yield f"{reason} ({name}{others})"


def results(name: str) -> list[Path]:
    """The saved files of one benchmark's rows."""
    return [
        path
        for path in sorted(_report.RESULTS.glob("*/*.json"))
        if json.loads(path.read_text())["meta"].get("benchmark") == name
    ]


def markdown(
    benchmark: Benchmark, rows: Sequence[Row], meta: Meta, figure: Path | None = None
) -> str:
    """The report of saved rows as Markdown, with the conditions above its tables.

    Predicted tables follow the measured ones, under a heading of their own.

    Args:
        figure: Where to draw the figure, if there is one; the page links its name.
    """
    parts = list(report(benchmark, rows, meta))
    passes = {row["pass"] for row in rows}
    # Reports of one device and dtype may differ in their pass alone.
    title = meta["device"], meta["dtype"], *(passes if len(passes) == 1 else ())
    whole = [f"### {', '.join(title)}"]
    if not meta.get("complete", True):
        whole.append("The run was interrupted: rows are missing.")
    lines = [
        f"- {name}: {_code(text)}" for name, text in _report.conditions(meta).items()
    ]
    lines += [_note(*note) for note in meta.get("notes", {}).items()]
    whole.append("\n".join(lines))
    drawing = benchmark.figure(rows, meta) if figure else None
    if figure and drawing:
        _figures.draw(drawing, figure, meta)
        whole.append(f"![{benchmark.name}, {meta['device']}]({figure.name})")
    for predicted in (False, True):
        shown = (part for part in parts if isinstance(part, _report.Table))
        of_kind = [table for table in shown if table.predicted == predicted]
        if predicted and of_kind:
            whole.append("#### Predicted, not measured")
            whole.append("From shapes and the data sheet of one H200.")
        for table in of_kind:
            whole += [f"**{_plain(table.title)}**", _grid(table)]
        if not predicted:
            whole += [_plain(part) for part in parts if isinstance(part, str)]
    return "\n\n".join(whole) + "\n"


def _note(name: str, text: str) -> str:
    """An item of a list; a name that is indented in the header is of the one above."""
    indent = "    " if name.startswith(" ") else ""
    return f"{indent}- {name.strip()}: {_plain(text)}"


def _plain(text: str) -> str:
    """Text in which nothing is Markdown."""
    return re.sub(r"([\\|*_<>\[\]])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{text}`" if "`" not in text else text


def _grid(table: _report.Table) -> str:
    def row(cells: Sequence[str]) -> str:
        blanks = [""] * (len(table.columns) - len(cells))
        return "| " + " | ".join([*cells, *blanks]) + " |"

    aligned = [":--", *["--:"] * (len(table.columns) - 1)]
    lines = [row([_plain(c) for c in table.columns]), row(aligned)]
    for name, *cells in table.lines:
        shown = _plain(name)
        lines.append(row([shown, *map(_plain, cells)] if cells else [f"**{shown}**"]))
    return "\n".join(lines)
