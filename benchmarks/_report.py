"""Tables of rows, and the files and streams that rows are written to."""

import csv
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from ._cli import EXTRA

try:
    from rich import progress
    from rich.console import Console
except ModuleNotFoundError:
    sys.exit("benchmarks need rich, which is not installed: pip install " + EXTRA)

from ._harness import Case, Row

FOLDER = Path(__file__).parent
PUBLISHED, RESULTS = FOLDER / "published", FOLDER / "results"
WIDTH = 80
Read = Callable[[Row], str]


def published(name: str) -> list[dict[str, str]]:
    """The published figures of one system, a dict a line."""
    with (PUBLISHED / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def device_name() -> str:
    """The accelerator's name, or the processor's and how many cores it gives us."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = re.search(r"^model name\s*:(.*)$", info.read_text(), re.MULTILINE)
        name = model[1].strip() if model else name
    return f"{name}, {os.cpu_count()} cores"


def _revision() -> str | None:
    # Without this, an installed benchmark would name the commit of the repository that
    # happens to hold its environment.
    if __package__ != "benchmarks":
        return importlib.metadata.version("jaxkern-fused")
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def program(benchmark: str) -> str:
    """How this benchmark is started: from a clone, or from the installed package."""
    return f"python -m {__package__}.{benchmark}"


def command(benchmark: str, arguments: Sequence[str]) -> str:
    """The shell command of this run.

    A relative path stays as it was given. An absolute one is given by its name alone,
    since the folders of one machine mean nothing on another.
    """
    # In --json=FILE as well, where the option is a part of the argument.
    folders = re.compile(r"^(--[\w-]+=)?/(?:.*/)?(?=[^/])")
    names = [folders.sub(r"\1", argument) for argument in arguments]
    return shlex.join([*program(benchmark).split(), *names])


def metadata(benchmark: str, **settings: Any) -> dict[str, Any]:
    """Everything that a reader needs to believe the rows and to measure them again."""
    return {
        "benchmark": benchmark,
        "command": command(benchmark, sys.argv[1:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "platform": jax.default_backend(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "revision": _revision(),
        **settings,
    }


def conditions(meta: Mapping[str, Any]) -> dict[str, str]:
    """The lines above a report: where, with what and how its rows were measured."""
    jaxlib = meta.get("jaxlib", meta["jax"])
    more = "" if meta["jax"] == jaxlib else f" (jaxlib {jaxlib})"
    where = f" ({meta['platform']})" if "platform" in meta else ""
    lines = {
        "device": f"{meta['device']}{where}",
        "versions": f"jax {meta['jax']}{more}, Python {meta['python']}, "
        f"jaxkern {meta.get('revision') or 'not in git'}",
    }
    if "seed" in meta:
        lines["inputs"] = (
            f"{meta['dtype']}, matmul precision {meta['matmul_precision']}, "
            f"seed {meta['seed']}"
        )
    if "timing_text" in meta:
        lines["timing"] = meta["timing_text"]
    if meta.get("command"):
        lines["command"] = meta["command"]
    if meta.get("matmul_peak_tflops"):
        peak = meta["matmul_peak_tflops"]
        rate = f"{peak:.0f} TFLOP/s" if peak >= 1 else f"{1e3 * peak:.0f} GFLOP/s"
        lines["matmul peak"] = f"{rate}, measured in this run"
    return lines


def print_header(console: Console, question: str, meta: Mapping[str, Any]) -> None:
    console.print(f"[bold]{question}[/bold]")
    for name, text in (conditions(meta) | meta.get("notes", {})).items():
        # A second line of a note stands under the first.
        shown = text.replace("\n", "\n" + " " * 14)
        line = f"  {name:<12}{shown}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, which takes its place once it is whole.

    Its name has the number of this process: others may write to the same `path`, and
    the last one wins.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_figure(figure: Any, path: Path) -> None:
    """Draw to a file; if that fails the program ends, and the file stays whole."""
    try:
        with replacing(path) as part:
            figure.savefig(part, dpi=150, format=path.suffix[1:].lower())
    except OSError as error:
        sys.exit(f"not drawn: {error}")


class Results:
    """Rows on their way to a JSON file that is whole after each of them."""

    def __init__(self, path: Path | None, meta: Mapping[str, Any]):
        self.path = path
        self.meta = {**meta, "complete": False}
        self.rows: list[Row] = []
        self.error: OSError | None = None

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write all rows; before the first one the file may hold an earlier run."""
        if self.path is None or not self.rows:
            return
        whole = json.dumps({"meta": self.meta, "rows": self.rows}, indent=1)
        try:
            with replacing(self.path) as part:
                part.write_text(whole + "\n")
            self.error = None
        # A full disk must not end the run: the rows are printed all the same.
        except OSError as error:
            self.error = error

    def end(self, complete: bool) -> bool:
        """Save once more; return whether it went well, and print why not."""
        self.meta["complete"] = complete
        self.save()
        if self.error:
            print(f"not saved: {self.error}", file=sys.stderr)
        return self.error is None


class RowProgress:
    """A bar on a terminal; elsewhere a line a row. On stderr: stdout is for tables."""

    def __init__(self, total: int, describe: Read):
        self.describe, self.total, self.done = describe, total, 0
        self.on_terminal = sys.stderr.isatty()
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not self.on_terminal,
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *error: object):
        self.bar.stop()

    def start(self, case: Case) -> None:
        self.bar.update(self.task, description=self.describe(dict(case.labels)))

    def finish(self, row: Row) -> None:
        self.done += 1
        self.bar.advance(self.task)
        if self.on_terminal:
            return
        result = f"{row['status']}: {row['reason']}"
        if row["status"] == "ok":
            result = f"{row['time_ms']:.3f} ms" if "time_ms" in row else "ok"
        line = f"[{self.done}/{self.total}] {self.describe(row)}: {result}"
        print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Table:
    """One table of a report, as text.

    columns: the first is text, the others are numbers; all are aligned so.
    lines: cells; a line of one cell heads the lines that follow it.
    predicted: whether its figures come from a model, and nothing in it was measured.
    """

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    predicted: bool = False


def listing(
    title: str,
    rows: Iterable[Row],
    name: Read,
    columns: Mapping[str, Read],
    head: Read = lambda row: "",
) -> Table:
    """A line a row, whose first figure is its status where that is not "ok".

    head: the line above all rows for which it is the same.
    """

    def line(row: Row) -> list[str]:
        cells = [read(row) for read in columns.values()]
        if row.get("status", "ok") != "ok":
            cells = [row["status"], *("" if c == "-" else c for c in cells[1:])]
        return [name(row), *cells]

    lines = headed((head(row), line(row)) for row in rows)
    return Table(title, ["", *columns], lines)


def headed(lines: Iterable[tuple[str, Sequence[str]]]) -> list[list[str]]:
    """Lines under their headings, each of which stands once above all that have it.

    Lines of the heading "" have none.
    """
    groups: dict[str, list[list[str]]] = {}
    for heading, (name, *cells) in lines:
        group = groups.setdefault(heading, [[heading]] if heading else [])
        group.append([f" {name}" if heading else name, *cells])
    return [line for group in groups.values() for line in group]


def pivot(
    title: str,
    rows: Sequence[Row],
    line: Read,
    column: Read,
    cell: Read,
    more: Mapping[str, Callable[[Mapping[str, Row]], str]] | None = None,
    head: Read = lambda row: "",
) -> Table:
    """A line for all rows of the same `line`, with a cell for each `column`.

    more: further columns, from the rows of a line by their column.
    """
    names = list(dict.fromkeys(map(column, rows)))
    lines, more = [], more or {}
    for (heading, name), group in grouped(rows, head, line).items():
        found = {column(row): row for row in group}
        cells = [status_or(cell, found.get(n)) for n in names]
        cells += [read(found) for read in more.values()]
        lines.append((heading, [name, *cells]))
    return Table(title, ["", *names, *more], headed(lines))


def status_or(read: Read, row: Row | None) -> str:
    """The figure of a row that is there and ok; else its status, or a dash."""
    if row is None:
        return "-"
    return read(row) if row.get("status", "ok") == "ok" else row["status"]


def make_console() -> Console:
    """As wide as the terminal, but at least 80 columns: numbers are never cut off."""
    console = Console(highlight=False)
    console.width = max(WIDTH, console.width if sys.stdout.isatty() else WIDTH)
    return console


def print_table(console: Console, what: Table) -> None:
    """Title, columns, a rule, and lines of no more than 80 columns where they fit."""
    title = f"{what.title}: predicted, not measured" if what.predicted else what.title
    rows = [line for line in what.lines if len(line) > 1]
    widths = [
        max(map(len, [column, *(row[i] for row in rows if i < len(row))]))
        for i, column in enumerate(what.columns)
    ]
    gap = "  " if sum(widths) + 2 * len(widths) <= WIDTH else " "
    most = console.width - sum(len(gap) + width for width in widths[1:]) - 1
    widths[0] = min(widths[0], most)

    def line(name: str, cells: Sequence[str]) -> str:
        sized = zip(cells, widths[1:], strict=False)
        # A name that is too long has a line of its own, so that no figure is cut off.
        first = name.ljust(widths[0]) if len(name) <= most else f"{name}\n "
        first += " " * (widths[0] - 1) if len(name) > most else ""
        return f" {first}{''.join(gap + c.rjust(w) for c, w in sized)}".rstrip()

    def show(text: str, bold: bool = False) -> None:
        console.print(
            text, style="bold" if bold else None, markup=False, soft_wrap=True
        )

    show(textwrap.fill(title, WIDTH), bold=True)
    show("")
    show(line(what.columns[0], what.columns[1:]), bold=True)
    show(" " + "─" * (sum(widths) + len(gap) * (len(widths) - 1)))
    for name, *cells in what.lines:
        show(line(name, cells) if cells else f" {name}", bold=not cells)
    show("")


def print_text(console: Console, text: str) -> None:
    """Lines of no more than 80 columns; one that is broken keeps its indent."""
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        shown = textwrap.fill(
            line,
            WIDTH,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        console.print(shown, markup=False, soft_wrap=True)


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent; a dash for None."""
    if value is None:
        return "-"
    before_point = 1 + math.floor(math.log10(abs(value))) if value else 1
    return f"{value:.{max(0, digits - before_point)}f}"


def ratio(ours: float | None, published: float | None = None) -> str:
    """Ours, and the published one, if there is one, in brackets."""
    text = "-" if ours is None else f"{ours:.2f}"
    return text if published is None else f"{text} ({published:.2f})"


def over(top: float | None, bottom: float | None) -> float | None:
    return top / bottom if top and bottom else None


def field(name: str, digits: int = 3, scale: float = 1, starred: bool = False) -> Read:
    """Reads a figure that a row may lack, for a column.

    starred: whether it is marked where the first of the timed calls compiled.
    """

    def read(row: Row) -> str:
        value = row.get(name)
        mark = "*" * bool(starred and row.get("includes_compile"))
        return mark + number(None if value is None else scale * value, digits)

    return read


# Milliseconds.
time = field("time_ms", starred=True)


def times(rows: Iterable[Row]) -> dict[str, Read]:
    """The columns of time, spread and rate."""
    return {"ms": time, "± std": field("std_ms", 2)} | rate(rows)


def rate(rows: Iterable[Row]) -> dict[str, Read]:
    """The column of the rate, in a unit that suits the device."""
    if on_gpu(rows):
        return {"TFLOP/s": field("tflops")}
    return {"GFLOP/s": field("tflops", scale=1e3)}


def on_gpu(rows: Iterable[Row]) -> bool:
    """Whether a row has the time of the kernels alone, which a GPU tells."""
    return any(row.get("device_ms") for row in rows)


def steady(row: Row) -> bool:
    """Whether a row has a time with no compilation in it."""
    return row["status"] == "ok" and not row["includes_compile"]


def grouped(rows: Iterable[Row], *keys: str | Read) -> dict[tuple, list[Row]]:
    """The rows by the values of these labels, or of functions of a row, in order."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        values = (row[key] if isinstance(key, str) else key(row) for key in keys)
        groups.setdefault(tuple(values), []).append(row)
    return groups


def allocated_mib(row: Row) -> float | None:
    """Results and temporaries, beside the arguments; None where nothing tells."""
    if row.get("allocated_bytes") is not None:
        return row["allocated_bytes"] / 2**20
    if "temp_bytes" not in row:
        return None
    kept = row.get("kept_bytes", 0)
    return (row["temp_bytes"] + row["output_bytes"] + kept) / 2**20
