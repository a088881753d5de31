"""The options that all benchmarks share, refused before anything runs if wrong."""

import argparse
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

# The argument of `pip install` where a package of the benchmarks is missing.
EXTRA = "'jaxkern-fused[bench]'"
DTYPES = ("float32", "bfloat16", "float16")
# The status of a program that SIGPIPE, signal 13, has ended.
BROKEN_PIPE = 128 + 13


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` as a program and exit with its status, whatever reads the output.

    A character that the output's encoding lacks is printed as "?". Where nobody reads
    on, as after `| head`, the program ends without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Without this, Python fails once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    sys.exit(status)


def _at_least(least: int) -> Callable[[str], int]:
    """Reads an integer, for argparse."""

    def read(text: str) -> int:
        digits = text.removeprefix("-")
        if not digits.isdecimal() or not least <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(
                f"must be an integer from {least} to {2**32 - 1}, got {text!r}"
            )
        return int(text)

    return read


positive, natural = _at_least(1), _at_least(0)


def names(valid: Sequence[object]) -> Callable[[str], list[str]]:
    """Reads comma-separated names out of those there are, for argparse."""
    known = [str(name) for name in valid]

    def read(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"must be among {', '.join(known)}, got {', '.join(unknown)!r}"
            )
        return list(dict.fromkeys(names))

    return read


def writable(text: str) -> Path:
    """The file behind `text`, which may be a link to it or not be there yet."""
    path = Path(text).resolve()
    folder = path.parent
    if path.exists() and not path.is_file():
        reason = "there is something that is no file"
    elif not folder.is_dir():
        reason = f"there is no folder {str(Path(text).parent)!r}"
    # The folder too: a new file replaces the old one, so that it is never half written.
    elif not all(os.access(p, os.W_OK) for p in (path, folder) if p.exists()):
        reason = "it may not be written"
    else:
        return path
    raise argparse.ArgumentTypeError(f"must be a file to write, got {text!r}: {reason}")


def plot_file(text: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            f"needs matplotlib, which is not installed: pip install {EXTRA}"
        )
    path = writable(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(
            f"must end in .png, .svg or .pdf, got {text!r}"
        )
    return path


def pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"must be a regular expression, got {text!r}: {error}"
        ) from None
    return text


def refuse(
    parser: argparse.ArgumentParser, args: argparse.Namespace, reason: str, *names: str
) -> None:
    """Refuse options that another one leaves without a meaning.

    Args:
        reason: What the message begins with: the other option, and why.
        names: Of the options, as the arguments have them.
    """
    options = {"peers": "--no-peers", "warmups": "--warmup"}
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"{reason}: leave out {options.get(name, f'--{name}')}")


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; one that adds its own of a name wins."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    add = parser.add_argument
    add("--full", action="store_true", help="the whole grid, on a CPU too")
    add("--list", action="store_true", help="print the rows there would be, and stop")
    help_only = "the rows, as --list prints them, in which it is found"
    add("--only", type=pattern, default="", metavar="REGEX", help=help_only)
    add("--json", type=writable, metavar="FILE", help="save the rows as they come")
    help_plot = "draw them (.png, .svg, .pdf)"
    add("--plot", type=plot_file, metavar="FILE", help=help_plot)
    help_warmup = "calls before the clock starts; with 0 the first one compiles "
    help_warmup += "(default: the timing line of the report says it)"
    add("--warmup", type=natural, metavar="N", help=help_warmup)
    add("--iterations", type=positive, metavar="N", help="calls to time, for every row")
    timings = "amortised", "per-call"
    help_timing = "wait for the device once a stretch of calls, or each call "
    help_timing += "(default: %(default)s)"
    add("--timing", choices=timings, default=timings[0], help=help_timing)
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    add("--seed", type=natural, default=0, metavar="N", help="of inputs and weights")
    help_peers = "plain jnp, and others' libraries where they are installed"
    peers = argparse.BooleanOptionalAction
    add("--peers", action=peers, default=True, help=help_peers)
    return parser
