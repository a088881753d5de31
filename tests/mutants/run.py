"""Check that the tests find the faults that they are there for.

    python tests/mutants/run.py
    python tests/mutants/run.py --only zigzag-order,word-order
    make mutants ARGS="--jobs 1"

Each mutant of `table.py` is one fault. It is put into a copy of the repository, where
the tests that must find it run. The verdict is

- caught: a test failed;
- SURVIVED: all tests passed;
- stale: its file does not have the text that it replaces exactly once;
- timed out: the tests took too long. This does not count as caught, because the
  emulator of GPU kernels ends a deadlock itself, with an error;
- BROKEN: no test ran, or the tests fail without the fault too; pytest's output follows.

The exit status is 1 unless all are caught. The working tree stays as it is.
"""

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
# pytest's exit codes, and a shell's for a command that Ctrl-C ended.
ALL_PASSED, SOME_FAILED = 0, 1
INTERRUPTED = 130
SAID_LINES = 30
NAME_WIDTH = max(len(mutant.name) for mutant in MUTANTS)
WIDTH = 80

Verdict = Literal["caught", "SURVIVED", "stale", "timed out", "BROKEN"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a mutant.

    seconds: the time of its tests.
    note: the test that failed, or what is wrong.
    said: pytest's last lines, if they are needed to explain the verdict.
    """

    verdict: Verdict
    seconds: float
    note: str
    said: str = ""


@dataclass(frozen=True)
class Run:
    """A run of pytest: its exit code, or None if it was stopped, and its output."""

    code: int | None
    seconds: float
    output: str

    @property
    def failed_test(self) -> str:
        found = re.search(r"^(?:FAILED|ERROR) \S*?::(.+?)(?: - |$)", self.output, re.M)
        return found.group(1) if found else ""

    @property
    def last_lines(self) -> str:
        return "\n".join(self.output.splitlines()[-SAID_LINES:])


def mutated(mutant: Mutant, root: Path) -> str | None:
    """Return the text of the file with the fault, or None if the mutant is stale."""
    path = root / mutant.path
    source = path.read_text() if path.exists() else ""
    if source.count(mutant.text) != 1:
        return None
    return source.replace(mutant.text, mutant.replacement)


def files_of(root: Path) -> list[str]:
    """Return all files that exist and that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    return [name for name in listed.decode().split("\0") if (root / name).is_file()]


def copy(root: Path, names: Sequence[str], tree: Path) -> None:
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, tree / name)


async def run_tests(tests: tuple[str, str], tree: Path, limit_s: float) -> Run:
    """Run pytest in a copy of the repository as `make test` does, in one process."""
    path, selected = tests
    command = [sys.executable, "-m", "pytest", path, "-k", selected]
    command += ["-x", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    start = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=tree,
        # Processes that tests start must import the copy too.
        env=os.environ | {"PYTHONPATH": str(tree), "COLUMNS": str(WIDTH)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), limit_s)
        code, text = process.returncode, output.decode(errors="replace")
    except TimeoutError:
        code, text = None, ""
    finally:
        # This ends what the tests started too, also after an interrupt.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return Run(code, time.perf_counter() - start, text)


def judge(run: Run, mutant: Mutant) -> Outcome:
    match run.code:
        case None:
            return Outcome("timed out", run.seconds, " -k ".join(mutant.tests))
        case code if code == SOME_FAILED and run.failed_test:
            return Outcome("caught", run.seconds, run.failed_test)
        case code if code == ALL_PASSED:
            return Outcome("SURVIVED", run.seconds, " -k ".join(mutant.tests))
        case code:
            note = f"pytest exited with {code}"
            return Outcome("BROKEN", run.seconds, note, run.last_lines)


class Trials:
    """Runs of the mutants of one tree, `jobs` at a time, each in its own copy.

    root: the tree that is copied.
    trust: do not check that the tests pass without the fault.
    """

    def __init__(self, root: Path, jobs: int, limit_s: float, trust: bool):
        self.root, self.limit_s, self.trust = root, limit_s, trust
        self.files = files_of(root)
        self.free = asyncio.Semaphore(jobs)
        self.unmutated: dict[tuple[str, str], asyncio.Task[Run]] = {}

    async def outcome(self, mutant: Mutant) -> Outcome:
        content = mutated(mutant, self.root)
        if content is None:
            return Outcome("stale", 0.0, f"its text is not once in {mutant.path}")
        async with self.free:
            if not self.trust:
                before = await self._run_unmutated(mutant.tests)
                if before.code != ALL_PASSED:
                    note = "its tests do not pass without it"
                    return Outcome("BROKEN", before.seconds, note, before.last_lines)
            return judge(await self._run(mutant.tests, {mutant.path: content}), mutant)

    async def _run_unmutated(self, tests: tuple[str, str]) -> Run:
        """Run tests without a fault, once for all mutants that have the same tests."""
        if tests not in self.unmutated:
            self.unmutated[tests] = asyncio.create_task(self._run(tests, {}))
        return await self.unmutated[tests]

    async def _run(self, tests: tuple[str, str], changed: Mapping[str, str]) -> Run:
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            tree = Path(folder)
            copy(self.root, self.files, tree)
            for path, content in changed.items():
                (tree / path).write_text(content)
            return await run_tests(tests, tree, self.limit_s)


def row(name: str, verdict: str, seconds: str, note: str) -> str:
    return f"{name:{NAME_WIDTH}}  {verdict:9}  {seconds:>4}  {note}"[:WIDTH].rstrip()


async def try_all(mutants: Sequence[Mutant], trials: Trials) -> list[Outcome]:
    """Print a row for each mutant as soon as it is done."""
    print(row("mutant", "verdict", "s", "seen by"))

    async def one(mutant: Mutant) -> Outcome:
        outcome = await trials.outcome(mutant)
        seconds = f"{outcome.seconds:.0f}"
        print(row(mutant.name, outcome.verdict, seconds, outcome.note), flush=True)
        if outcome.said:
            print(outcome.said, flush=True)
        return outcome

    return await asyncio.gather(*map(one, mutants))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAMES", help="separated by commas")
    parser.add_argument("--list", action="store_true", help="say what each does")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to copy")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="limit of one run of the tests"
    )
    parser.add_argument(
        "--trust", action="store_true", help="that all tests pass without a fault"
    )
    options = parser.parse_args(argv)
    known = {mutant.name for mutant in MUTANTS}
    options.names = options.only.split(",") if options.only else sorted(known)
    if unknown := sorted({*options.names} - known):
        parser.error(f"--only: no mutant is called {', '.join(unknown)}; see --list")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    chosen = [mutant for mutant in MUTANTS if mutant.name in options.names]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name}\n  {mutant.fault}\n  {mutant.path}")
        return 0

    async def run() -> list[Outcome]:
        root = options.root.resolve()
        trials = Trials(root, options.jobs, options.seconds, options.trust)
        return await try_all(chosen, trials)

    start = time.perf_counter()
    try:
        outcomes = asyncio.run(run())
    except KeyboardInterrupt:
        return INTERRUPTED
    caught = sum(outcome.verdict == "caught" for outcome in outcomes)
    seconds = time.perf_counter() - start
    print(f"{caught} of {len(outcomes)} mutants caught, in {seconds:.0f} s")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
