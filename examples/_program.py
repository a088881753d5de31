"""How the examples check where they draw, and how they run.

Examples stand alone, for who takes the folder away: so `run_program` is here and, for
benchmarks, in `benchmarks/_cli.py`. One test holds both to the same.
"""

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# The status of a program that SIGPIPE, signal 13, has ended.
BROKEN_PIPE = 128 + 13


def check_plot(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """A picture can be drawn there, which shows before any work and not after it."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if path.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot must end in .png, .svg or .pdf, got {str(path)!r}")
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        parser.error(f"--plot must be in a folder to write to, got {str(path)!r}")
    if path.exists() and not os.access(path, os.W_OK):
        parser.error(f"--plot must be a file to write, got {str(path)!r}")


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
