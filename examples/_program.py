"""How all examples read options, draw pictures, write files, and end.

The examples work without the rest of the repository. So `run_program` and `replacing`
are here and, for benchmarks, in `benchmarks/_cli.py` and `benchmarks/_report.py`. The
same tests run on both copies.
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

# The exit status of a program that SIGPIPE, signal 13, has ended.
BROKEN_PIPE = 128 + 13


def refuse_options(description: str | None) -> None:
    """Refuse all options but --help, which prints the description."""
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=description, formatter_class=raw).parse_args()


def add_plot(parser: argparse.ArgumentParser, picture: str) -> None:
    """Add the option --plot, whose value `check_plot` checks."""
    text = f"draw {picture} (.png, .svg, .pdf)"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=text)


def check_plot(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Refuse, before any work, a path where no picture can be drawn."""
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
    """Yield a file beside `path` that replaces it once it is whole and on the disk."""
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
    """Save a figure; an error ends the program and leaves the old file whole."""
    try:
        with replacing(path) as part:
            figure.savefig(part, dpi=150, format=path.suffix[1:])
    except OSError as error:
        sys.exit(f"not drawn: {error}")


def run_program(main: Callable[[], Any]) -> NoReturn:
    """Run `main` as a program, whatever reads the output.

    A character that the output's encoding lacks is printed as "?". If the reader
    leaves, as in `| head`, the program ends without a traceback.
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
