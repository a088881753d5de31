"""How the examples read options, write files, check where they draw, and run.

Examples stand alone, for who takes the folder away: so `run_program` is here and, for
benchmarks, in `benchmarks/_cli.py`, as is `replacing`, in `benchmarks/_report.py`. One
test holds both to the same.
"""

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# The status of a program that SIGPIPE, signal 13, has ended.
BROKEN_PIPE = 128 + 13


def refuse_options(description: str | None) -> None:
    """For a program without options: --help describes it, and others are errors."""
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=description, formatter_class=raw).parse_args()


def add_plot(parser: argparse.ArgumentParser, picture: str) -> None:
    """The option --plot, which `check_plot` checks."""
    text = f"draw {picture} (.png, .svg, .pdf)"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=text)


def check_plot(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """A picture can be drawn there, which shows before any work and not after it."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if path.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot must end in .png, .svg or .pdf, got {str(path)!r}")
    if not os.access(path.resolve().parent, os.W_OK):
        parser.error(f"--plot must be in a folder to write to, got {str(path)!r}")
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        parser.error(f"--plot must be a file to write, got {str(path)!r}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, which takes its place once it is whole and on the disk."""
    path = path.resolve()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_figure(figure: Any, path: Path) -> None:
    """What cannot be written ends the program with its reason; `path` stays whole."""
    try:
        with replacing(path) as part:
            figure.savefig(part, dpi=150, format=path.suffix[1:])
    except OSError as error:
        sys.exit(f"not drawn: {error}")


def run_program(main: Callable[[], Any]) -> NoReturn:
    """Run `main` as a program, whatever reads the output.

    A character that the output's encoding lacks is printed as "?". Where nobody reads
    on, as after `| head`, the program ends without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            main()
            status = 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Without this, Python fails once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    sys.exit(status)
