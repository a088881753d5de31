"""What do our kernels need of the chip, and do they compile without spilling?

    make kernels                      installs the compiler's packages first
    python -m benchmarks.kernels      compiles every configuration we ship for sm_90a

Needs no GPU. Exits with 1 if a kernel does not compile, spills registers, has its
tensor-core instructions serialized, or needs more shared memory than a block has.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxkern import _flash_mlp_mgpu
from jaxkern._activations import ACTIVATIONS

from ._cli import pattern, writable
from ._harness import Row
from ._kernel_compile import (
    Missing,
    build_stub,
    compile_module,
    lower,
    problems,
    requirements,
)
from ._report import Results, make_console, metadata, print_table, table

HEADS, BATCH, HIDDEN = 16, 2048, 1024
WORKERS = 2
COLUMNS = {
    "regs": "registers",
    "spill B": "spill_stores_bytes",
    "SMEM B": "smem_bytes",
    "wgmma": "wgmma",
    "MUFU": "mufu",
    "instr.": "instructions",
}


def _flash_mlp(make: Callable[..., Any], dim: int, ups: int, backward: bool):
    up, down, tokens = (dim, HIDDEN), (HIDDEN, dim), (BATCH, dim)
    shapes = [tokens, *[up] * ups, down, *[tokens] * backward]
    args = [jax.ShapeDtypeStruct((HEADS, *s), jnp.bfloat16) for s in shapes]
    return make(), tuple(args)


def make_cases() -> dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]]:
    """Every kernel with every configuration that can be chosen for it."""
    kernels = _flash_mlp_mgpu
    cases = {}

    def add(label, kernel, dim, ups, activation, *wanted):
        make = getattr(kernels, kernel)
        for config in kernels.configs(kernel, dim, ups):
            size = f"{config.rows}x{config.columns}{' split' * config.split}"
            build = partial(make, activation, *wanted, config)
            backward = kernel != "forward"
            cases[f"flash_mlp {label} {dim} {size}"] = partial(
                _flash_mlp, build, dim, ups, backward
            )

    def add_all(label, dim, ups, activation):
        add(f"{label}forward", "forward", dim, ups, activation)
        add(f"{label}dx", "backward_x", dim, ups, activation)
        for wanted in kernels.weight_passes(dim, ups):
            names = ("gate", "w1", "w2")[-ups - 1 :]
            name = " ".join(f"d{names[n]}" for n in wanted)
            add(f"{label}{name}", "backward_w", dim, ups, activation, wanted)

    for dim in range(16, kernels.MAX_DIM + 1, 16):
        add_all("", dim, 1, "silu")
    for dim in range(32, kernels.MAX_GATED_DIM + 1, 32):
        add_all("gated ", dim, 2, "silu")
    for activation in ACTIVATIONS:
        if activation != "silu":
            add_all(f"{activation} ", 64, 1, activation)
    return cases


def measure(name: str, build: Callable[[], Any], tools: tuple[Any, ...]) -> Row:
    """One row; a kernel that fails is a failed row."""
    row: Row = {"kernel": name}
    try:
        fn, args = build()
        (module,) = lower(fn, args)
        row |= compile_module(module, *tools)
        reason = problems(row)
    # Whatever a kernel raises is its result, and the others still run.
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line}"
    return row | {"status": "failed" if reason else "ok", "reason": reason}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", type=pattern, default="", metavar="REGEX", help="of the names")
    add("--json", type=writable, metavar="FILE", help="save the rows as they come")
    args = parser.parse_args(argv)
    try:
        plugin, disassembler = requirements()
    except Missing as missing:
        print(f"benchmarks.kernels: {missing}", file=sys.stderr)
        return 3
    # Nothing runs on a device, and the plugin is not to look for one.
    jax.config.update("jax_platforms", "cpu")
    cases = {n: b for n, b in make_cases().items() if re.search(args.only, n)}
    results = Results(args.json, metadata("kernels", arch="sm_90a"))
    console = make_console()
    title = "flash_mlp compiled for sm_90a; counts are static, a loop counts once"
    result = table(title, ["", *COLUMNS])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as stub, ThreadPoolExecutor(WORKERS) as pool:
        build_stub(Path(stub))
        tools = plugin, disassembler, Path(stub)
        rows = pool.map(lambda case: measure(case[0], case[1], tools), cases.items())
        for row in rows:
            results.add(row)
            cells = [str(row.get(field, "-")) for field in COLUMNS.values()]
            result.add_row(row["kernel"].removeprefix("flash_mlp "), *cells)
    print_table(console, result)
    failed = [row for row in results.rows if row["status"] == "failed"]
    for row in failed:
        console.print(f"failed: {row['kernel']}: {row['reason']}", markup=False)
    seconds = time.perf_counter() - start
    console.print(
        f"{len(results.rows)} kernels in {seconds:.0f} s, {len(failed)} failed"
    )
    results.meta["complete"] = True
    results.save()
    return int(bool(failed) or results.error is not None)


if __name__ == "__main__":
    sys.exit(main())
