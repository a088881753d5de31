"""Do our kernels compile without spilling, and what do they need of the chip?

    make kernels                      installs the compiler's packages first
    make kernels ARGS=--all           compiles what is unchanged too

Needs no GPU. Of every configuration that a launch may choose, it compiles for sm_90a
what differs from the last run: nothing is lowered where no source changed, and nothing
compiled whose lowered module is the same. Exits with 1 if a kernel does not compile,
spills registers, has its tensor-core instructions serialized, or needs more shared
memory than a block has.
"""

import argparse
import hashlib
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxkern
from jaxkern.testing import CompiledKernel, MissingCompiler
from jaxkern.testing.compiler import compile_module, fingerprint, lower, versions
from jaxkern.testing.tools import Tools, build_stub, tools

from . import _kernels_cases
from . import _report as report
from ._cli import pattern, run_program, writable
from ._harness import KERNEL, Row, first_line, labels, name_of
from ._kernels_cases import every_case

RECORD = report.RESULTS / "sm_90a/kernels.json"
PACKAGE = Path(jaxkern.__file__).parent
# Sources in `jaxkern.testing` that compile a module.
MEASURING = (
    "compiler.py",
    "compiler_process.py",
    "cuda_stub.c",
    "order.py",
    "tools.py",
)
WORKERS = 2
# So many kernels are lowered before other processes would have started.
FEW = 16
# Columns, and names of the instructions that they count.
COUNTED = {
    "hgmma": "HGMMA",
    "hgmma_sparse": "HGMMA.SP",
    "mufu": "MUFU",
    "instructions": "",
}
SHOWN = {
    "regs": "registers",
    "spill B": "spill_stores_bytes",
    "SMEM B": "smem_bytes",
    "wgmma": "wgmma",
    "MUFU": "mufu",
    "instr.": "instructions",
}


def figures(kernel: CompiledKernel) -> Row:
    """The columns of a row."""
    return {
        "registers": kernel.registers,
        "stack_bytes": kernel.stack_bytes,
        "spill_stores_bytes": kernel.spill_stores_bytes,
        "spill_loads_bytes": kernel.spill_loads_bytes,
        "barriers": kernel.barriers,
        "wgmma": kernel.wgmma,
        "serialized": kernel.is_serialized,
        "compile_s": round(kernel.seconds, 3),
        "smem_bytes": kernel.smem_bytes,
    } | {name: kernel.count(opcode) for name, opcode in COUNTED.items()}


def measure(name: str, tools: Tools, stub: Path, known: Row | None = None) -> Row:
    """One row; a kernel that fails is a failed row.

    known: an earlier row, which stays where the module is still the same.
    """
    op, _, variant = name.partition(" ")
    row: Row = labels(op, variant, KERNEL, "compiled", jnp.dtype(jnp.bfloat16))
    try:
        fn, args = every_case()[name]()
        (module,) = lower(fn, args)
        row["module"] = fingerprint(module)
        if known and row["module"] == known["module"]:
            return known
        kernel = compile_module(module, tools, stub)
        row |= figures(kernel)
        reason = kernel.problem()
    # Whatever a kernel raises is its result, and the others still run.
    except Exception as error:
        reason = first_line(error)
    return row | {"status": "failed" if reason else "ok", "reason": reason}


def measure_all(
    names: Sequence[str], tools: Tools, known: Mapping[str, Row]
) -> Iterator[Row]:
    """The rows of these kernels.

    Many are for processes: lowering takes most of the time, at which threads would take
    turns.
    """
    with tempfile.TemporaryDirectory() as stub, ExitStack() as stack:
        build_stub(Path(stub))
        work = [(name, tools, Path(stub), known.get(name)) for name in names]
        if len(names) < FEW:
            yield from starmap(measure, work)
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(WORKERS, context, on_cpu)
        yield from stack.enter_context(pool).map(measure, *zip(*work, strict=True))


def on_cpu() -> None:
    """Nothing runs on a device, and JAX is not to look for one."""
    jax.config.update("jax_platforms", "cpu")


def sources(package: Path = PACKAGE) -> str:
    """A hash of every source that a kernel's module may depend on."""
    # An installed package holds the benchmarks as well.
    apart = {package / "testing", package / "benchmarks"}
    files = [p for p in package.rglob("*.py") if apart.isdisjoint(p.parents)]
    return _hash(package, files, Path(__file__), Path(_kernels_cases.__file__))


def measuring(package: Path = PACKAGE) -> str:
    """A hash of the sources that compile a module and count what it needs.

    Without this, a row would stay as it is where what is wrong with it can now be seen.
    """
    files = [package / "testing" / name for name in MEASURING]
    return _hash(package, files, Path(__file__))


def _hash(package: Path, files: Sequence[Path], *scripts: Path) -> str:
    """A hash of these files, by their names in the package, and of scripts."""
    digest = hashlib.sha256(b"".join(script.read_bytes() for script in scripts))
    for path in sorted(files):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass
class Record:
    """The rows of earlier runs by name, and of which sources and compilers they are.

    Attributes:
        rows: By the kernel's name.
        sources: Of which all rows are; None if some are of others.
        versions: Of JAX, of the assembler and of the sources that measure.
    """

    rows: dict[str, Row]
    sources: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record of a file; an empty one if it is not there."""
        if not path.exists():
            return cls({})
        whole = json.loads(path.read_text())
        rows = {name_of(row): row for row in whole["rows"]}
        return cls(rows, whole["meta"].get("sources"), whole["meta"].get("versions"))

    def good(self, versions: dict[str, str]) -> dict[str, Row]:
        """The rows by name that these compilers would give again for a same module."""
        if versions != self.versions:
            return {}
        return {
            name: row
            for name, row in self.rows.items()
            if row["status"] == "ok" and "module" in row
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=report.program("kernels"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", type=pattern, default="", metavar="REGEX", help="of the names")
    add("--all", action="store_true", help="compile what is unchanged too")
    text = "where the rows of earlier runs are, and this one's go (%(default)s)"
    add("--json", type=writable, default=str(RECORD), metavar="FILE", help=text)
    args = parser.parse_args(argv)
    names = [name for name in every_case() if re.search(args.only, name)]
    if not names:
        parser.error(f"--only must be found in the name of a kernel, got {args.only!r}")
    try:
        found = tools()
    except MissingCompiler as missing:
        print(f"benchmarks.kernels: {missing}", file=sys.stderr)
        return 3
    on_cpu()
    record = Record.read(args.json)
    new = Record({}, sources(), versions(found) | {"measuring": measuring()})
    good = {} if args.all else record.good(new.versions)
    kept = good if record.sources == new.sources else {}
    start, fresh = time.perf_counter(), {}
    todo = [name for name in names if name not in kept]
    try:
        for row in measure_all(todo, found, good):
            fresh[name_of(row)] = row
    finally:
        new.rows = fresh | {name: kept[name] for name in names if name in kept}
        # Without this, a run that changed nothing would change its date in the file.
        error = save(args.json, record, new) if fresh else None
    console = report.make_console()
    report.print_table(console, make_table([new.rows[name] for name in names]))
    failed = [row for row in new.rows.values() if row["status"] == "failed"]
    for row in failed:
        console.print(f"failed: {name_of(row)}: {row['reason']}", markup=False)
    compiled = sum(row != good.get(name_of(row)) for row in fresh.values())
    console.print(
        f"{len(names)} kernels in {time.perf_counter() - start:.0f} s: {compiled} "
        f"compiled, {len(names) - compiled} unchanged, {len(failed)} failed"
    )
    return int(bool(failed) or error is not None)


def make_table(rows: Sequence[Row]) -> report.Table:
    def count(column: str) -> Callable[[Row], str]:
        return lambda row: str(row.get(column, "-"))

    title = "compiled for sm_90a; counts are static, a loop counts once"
    return report.listing(title, rows, name_of, {k: count(c) for k, c in SHOWN.items()})


def save(path: Path, record: Record, new: Record) -> OSError | None:
    """Write the new rows, and the earlier ones that these compilers gave too.

    Kernels that there are no more have no row.
    """
    earlier = record.rows if record.versions == new.versions else {}
    rows = [row for n in every_case() if (row := new.rows.get(n) or earlier.get(n))]
    is_current = record.sources == new.sources or all(
        name_of(row) in new.rows for row in rows
    )
    meta = report.metadata("kernels", arch="sm_90a", versions=new.versions)
    meta["sources"] = new.sources if is_current else None
    results = report.Results(path, meta)
    results.rows, results.meta["complete"] = rows, len(rows) == len(every_case())
    results.save()
    return results.error


if __name__ == "__main__":
    run_program(main)
