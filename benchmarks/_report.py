"""What a benchmark prints, draws and saves."""

import argparse
import csv
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from ._harness import Case, Options, Row, run

PUBLISHED = Path(__file__).parent / "published"
WIDTH = 80


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
        models = [
            s for s in info.read_text().splitlines() if s.startswith("model name")
        ]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {os.cpu_count()} cores"


def _revision() -> str | None:
    # Without this, an installed benchmark would name the commit of the repository that
    # happens to hold its environment.
    if __package__ != "benchmarks":
        return importlib.metadata.version("jaxkern-fused")
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def command(benchmark: str, arguments: Sequence[str]) -> str:
    """To be run again in a shell; of files elsewhere only their names are kept."""
    names = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *names])


def metadata(benchmark: str, **settings: Any) -> dict[str, Any]:
    """What one must know to believe the rows, and to run them again."""
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


def print_header(console: Console, question: str, meta: Mapping[str, Any]) -> None:
    console.print(f"[bold]{question}[/bold]")
    same = meta["jax"] == meta["jaxlib"]
    jaxlib = "" if same else f" (jaxlib {meta['jaxlib']})"
    versions = f"jax {meta['jax']}{jaxlib}, Python {meta['python']}"
    lines = {
        "device": f"{meta['device']} ({meta['platform']})",
        "versions": f"{versions}, jaxkern {meta['revision'] or 'not in git'}",
        "inputs": f"{meta['dtype']}, matmul precision {meta['matmul_precision']}, "
        f"seed {meta['seed']}",
        "timing": meta["timing_text"],
        "command": meta["command"],
    }
    if meta.get("matmul_peak_tflops"):
        peak = f"{meta['matmul_peak_tflops']:.0f} TFLOP/s, measured in this run"
        lines["matmul peak"] = peak
    lines |= meta.get("notes", {})
    for name, text in lines.items():
        line = f"  {name:<12}{text}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, which takes its place once it is whole.

    Of this process alone: others may write to the same `path`, and the last one wins.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_figure(figure: Any, path: Path) -> None:
    """What cannot be written ends the program with its reason; `path` stays whole."""
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
        """Not before there is a row: the file may hold an earlier run."""
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
        """Save once more; whether it went well, and why not is printed."""
        self.meta["complete"] = complete
        self.save()
        if self.error:
            print(f"not saved: {self.error}", file=sys.stderr)
        return self.error is None


class RowProgress:
    """A bar on a terminal; elsewhere a line a row. On stderr: stdout is for tables."""

    def __init__(self, total: int, describe: Callable[[Mapping[str, Any]], str]):
        self.describe = describe
        self.total = total
        self.done = 0
        self.bar = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
            )
            console = Console(stderr=True)
            self.bar = Progress(
                *columns, TimeElapsedColumn(), console=console, transient=True
            )
            self.task = self.bar.add_task("", total=total)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ):
        if self.bar:
            self.bar.stop()

    def start(self, case: Case) -> None:
        if self.bar:
            self.bar.update(self.task, description=self.describe(case.labels))

    def finish(self, row: Row) -> None:
        self.done += 1
        if self.bar:
            self.bar.advance(self.task)
            return
        ok = row["status"] == "ok"
        result = (
            f"{row['time_ms']:.3f} ms" if ok else f"{row['status']}: {row['reason']}"
        )
        line = f"[{self.done}/{self.total}] {self.describe(row)}: {result}"
        print(line, file=sys.stderr, flush=True)


def list_or_run(
    args: argparse.Namespace,
    cases: list[Case],
    describe: Callable[[Mapping[str, Any]], str],
    run: Callable[[argparse.Namespace, list[Case], str], int],
) -> int:
    """The names of the rows if they are asked for, else what `run` returns."""
    if args.list:
        print("\n".join(describe(case.labels) for case in cases))
        return 0
    # On a GPU float32 would silently be tf32.
    precision = "highest" if args.dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        return run(args, cases, precision)


def execute(
    cases: Sequence[Case],
    options: Options,
    meta: Mapping[str, Any],
    json_path: Path | None,
    describe: Callable[[Mapping[str, Any]], str],
) -> tuple[list[Row], int]:
    """Run the cases with progress, saving row by row; an interrupt ends them early.

    Returns:
        The rows that were measured, and the exit status: 130 after an interrupt, 1 if a
        row failed or the rows could not be saved.
    """
    results = Results(json_path, meta)
    complete = True
    with RowProgress(len(cases), describe) as progress:

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
    saved = results.end(complete)
    failed = not saved or any(row["status"] == "failed" for row in results.rows)
    return results.rows, int(failed) if complete else 130


def table(title: str, columns: Sequence[str]) -> Table:
    """An empty table: the first column is text, the others are numbers."""
    result = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return result


def make_console() -> Console:
    """As wide as the terminal, but at least 80 columns: numbers are never cut off."""
    console = Console(highlight=False)
    console.width = max(WIDTH, console.width if sys.stdout.isatty() else WIDTH)
    return console


def print_table(console: Console, what: Table) -> None:
    """To a file without the blanks that fill up its lines."""
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as capture:
        console.print(what)
    for line in capture.get().splitlines():
        print(line.rstrip())


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent; a dash for None."""
    if value is None:
        return "-"
    before_point = 1 + math.floor(math.log10(abs(value))) if value else 1
    return f"{value:.{max(0, digits - before_point)}f}"


def ratio(ours: float | None, published: float | None) -> str:
    """Ours, and the published one, if there is one, in brackets."""
    text = "-" if ours is None else f"{ours:.2f}"
    return text if published is None else f"{text} ({published:.2f})"


def print_problems(console: Console, rows: Iterable[Row], describe) -> None:
    """The rows that are not ok, by their whole reason."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.get("device_ms_reason"):
            reason = f"no device time: {row['device_ms_reason']}"
            by_reason.setdefault(reason, []).append(describe(row))
        if row["status"] != "ok":
            reason = f"{row['status']}: {row['reason']}"
            by_reason.setdefault(reason, []).append(describe(row))
    for reason, names in by_reason.items():
        more = f" and {len(names) - 1} more rows" if len(names) > 1 else ""
        console.print(f"{reason} ({names[0]}{more})", markup=False, soft_wrap=True)
