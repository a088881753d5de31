"""What do our kernels need of the chip, and do they compile without spilling?

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
from functools import cache, partial
from itertools import starmap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkern
from jaxkern import BlockMask
from jaxkern._attention.block_mask.mask import with_keys
from jaxkern._attention.dilation import HeadStride
from jaxkern._attention.hopper import kernels as _attention_kernels
from jaxkern._core.activations import ACTIVATIONS
from jaxkern._masked.hopper import gradients as _masked_gradients
from jaxkern._masked.hopper import product as _masked_product
from jaxkern._masked.packed import WORD
from jaxkern._mlp.hopper import flash, flash_tiles, fused, sparse
from jaxkern._mlp.thresholds import LARGEST_FLASH_RANK
from jaxkern._mosaic.launch import CONTRACTED_STEP
from jaxkern._mosaic.work import GATED_COLUMNS, TILE_COLUMNS
from jaxkern._sparsity.hopper.product import sparse_matmul
from jaxkern.testing import CompiledKernel, MissingCompiler
from jaxkern.testing.compiler import compile_module, fingerprint, lower, versions
from jaxkern.testing.tools import Tools, build_stub, tools

from ._cli import pattern, run_program, writable
from ._harness import KERNEL, Row, labels
from ._report import (
    RESULTS,
    Results,
    Table,
    listing,
    make_console,
    metadata,
    print_table,
    program,
)

HEADS, BATCH, HIDDEN, SEQ = 16, 2048, 1024, 2048
Cases = dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]]
RECORD = RESULTS / "sm_90a/kernels.json"
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


Array = tuple[int, ...] | tuple[tuple[int, ...], Any]


def _case(make: Callable[..., Any], *arrays: Array):
    """A function and its arguments: shapes of 16 bits, or shapes with a dtype."""
    pairs = (a if isinstance(a[0], tuple) else (a, jnp.bfloat16) for a in arrays)
    return make, tuple(jax.ShapeDtypeStruct(*pair) for pair in pairs)


def _attention(
    run: Callable[..., Any],
    dim: int,
    mask: Callable[[], BlockMask],
    rate: int = 1,
    backward: bool = True,
):
    """With two query heads a key head, of two batches."""
    key = 2, SEQ, rate * 2, dim
    arrays: list[Array] = [(2, SEQ, rate * 4, dim), key, key]
    if backward:
        arrays += [(2, SEQ, 4, dim), ((2, 4, 2, SEQ), jnp.float32)]
    dilation = HeadStride(rate, heads=4, run=2) if rate > 1 else None
    run = partial(run, mask=mask(), scale=dim**-0.5, dilation=dilation)
    return _case(run, *arrays)


def _attention_masks() -> dict[str, tuple[Sequence[int], Callable[[], BlockMask]]]:
    """By name: head dims, and a mask whose partial blocks ask one kind of predicate."""
    every = 16, 32, 48, 64, 80, 96, 128, 144, 192, 208, 224, 256
    ids = np.arange(SEQ) // 300

    def causal(block_size=128):
        return BlockMask.causal(SEQ, SEQ, block_size=block_size)

    def in_blocks():
        blocks = np.random.default_rng(0).random((4, SEQ // 128, SEQ // 128)) < 0.5
        return BlockMask.from_blocks(blocks) & causal()

    return {
        "causal": (every, causal),
        "blocks of 64": ((64, 128, 256), partial(causal, 64)),
        "documents": ((64, 128, 256), lambda: BlockMask.document(ids) & causal()),
        "keys": ((128,), lambda: with_keys(causal(), np.ones((2, 1, SEQ), bool))),
        "in blocks": ((128,), in_blocks),
        "bits": ((128,), lambda: BlockMask.from_dense(np.tri(SEQ, SEQ) % 3 == 1)),
        "strided": ((128,), lambda: BlockMask.strided(SEQ, SEQ, stride=2) & causal()),
    }


def attention_cases() -> Cases:
    """Every head dim, and every kind of predicate."""
    cases = {}
    masks = _attention_masks()
    masks["dilated"] = (64, 128, 256), masks["causal"][1]
    for name, (dims, mask) in masks.items():
        rate = 4 if name == "dilated" else 1
        for dim in dims:
            launches: dict[str, Any] = {
                "forward": partial(_attention_kernels.forward, exact=True),
                "dq": _attention_kernels.backward_q,
            }
            for wanted in _attention_kernels.kv_launches(dim):
                label = " ".join(f"d{x[0]}" for x in wanted)
                launches[label] = partial(_attention_kernels.backward_kv, wanted=wanted)
            for label, run in launches.items():
                cases[f"attention {label} {dim} {name}"] = partial(
                    _attention, run, dim, mask, rate, backward=label != "forward"
                )
    return cases


def _masked(make: Callable[..., Any], kind: str, dtype: Any, wide: tuple[int, ...]):
    """Arguments of four samples with 256 tokens, of `wide` features each."""
    samples, seq, d_in, d_out = 4, 256, 512, 2048
    rows = d_in // WORD if kind == "bits" else d_in
    features = [(samples, seq, n) for n in wide]
    return _case(make, *features, (1, d_in, d_out), ((samples, rows, d_out), dtype))


def masked_cases() -> Cases:
    """Every configuration, and every kind of mask: of 32 bits, of 16, and packed."""
    kernels, cases = _masked_product, {}
    configs = [kernels.MaskedTiles(n, k) for n in kernels.TILE_TOKENS for k in (1, 2)]
    of_logits = "logits", "straight_through", jnp.float32, configs
    of_masks = "mask", "mask", jnp.bfloat16, configs[:1]
    of_bits = "bits", "bits", jnp.int32, configs
    # A backward reads bits for logits, which a forward then writes.
    products = {
        "forward": ({}, of_logits, of_masks, of_bits),
        "packing": ({"pack": True}, of_logits),
        "dx": ({"transposed": True}, of_masks, of_bits),
    }
    for label, (options, *kinds) in products.items():
        features = 2048 if "transposed" in options else 512
        for name, kind, dtype, configs in kinds:
            for config in configs:
                make = kernels.product_kernel(kind, tiles=config, **options)
                size = str(config.tokens)
                if config.splits > 1:
                    size += " split"
                cases[f"masked {label} {size} {name}"] = partial(
                    _masked, make, kind, dtype, (features,)
                )
    all_three = {"dw": (False, True), "dmask": (True, False), "dmask dw": (True, True)}
    # Straight-through's masks alone are not read, and the others are as bits.
    gradients: dict[Any, Any] = {
        kind: (dtype, all_three) for _, kind, dtype, _ in (of_masks, of_bits)
    }
    gradients["straight_through"] = jnp.float32, {"dmask": (True, False)}
    sloped = {label: all_three[label] for label in ("dmask", "dmask dw")}
    gradients |= {
        kind: (jnp.float32, sloped) for kind in ("one_plus_sigmoid", "reinmax")
    }
    for kind, (dtype, wanted) in gradients.items():
        made = jnp.float32 if kind == "bits" else dtype
        for label, (mask, w) in wanted.items():
            of = _masked_gradients.Wanted(False, w, mask, made)
            make = _masked_gradients.gradients_kernel(kind, of)
            cases[f"masked {label} {of.columns} {kind}"] = partial(
                _masked, make, kind, dtype, (512, 2048)
            )
    return cases


def _flash_mlp_passes(
    dim: int, ups: int, inputs: int
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Label and kernel of each launch, and the weights whose gradients it makes."""
    yield "forward", "forward", ()
    yield "dx" if inputs == 1 else "dx0 dx1", "backward_x", ()
    names = ("gate", "w1", "w2")[-ups - 1 :]
    for wanted in flash_tiles.weight_passes(dim, ups):
        yield " ".join(f"d{names[n]}" for n in wanted), "backward_w", (wanted,)


def _flash_mlp(
    label: str, activation: str, dim: int, ups: int, inputs: int = 1
) -> Cases:
    """All launches of one form, with all tiles that can be chosen.

    ups, inputs: how many first matrices there are, and how many inputs.
    """
    cases = {}
    for name, kernel, wanted in _flash_mlp_passes(dim, ups, inputs):
        shapes = [(BATCH, inputs * dim), *[(dim, HIDDEN)] * ups, (HIDDEN, dim)]
        if kernel != "forward":
            shapes.append((BATCH, dim))
        for config in flash_tiles.configs(kernel, dim, ups, inputs):
            size = f"{config.rows}x{config.columns}"
            if config.split:
                size += " split"
            make = partial(getattr(flash, kernel), activation, *wanted, config)
            case = f"flash_mlp {label}{name} {dim} {size}"
            cases[case] = partial(_made, make, [(HEADS, *shape) for shape in shapes])
    return cases


def _made(make: Callable[[], Any], shapes: Sequence[Array]):
    return _case(make(), *shapes)


def flash_mlp_cases() -> Cases:
    """Every configuration that can be launched with silu.

    The other activations can be launched with every dim too, and are compiled with 64,
    in both forms; and ReLU² with the ranks at which `low_rank_relu2` takes this kernel.
    """
    cases = {}
    for dim in range(CONTRACTED_STEP, flash.MAX_DIM + 1, CONTRACTED_STEP):
        cases |= _flash_mlp("", "silu", dim, ups=1)
    for dim in range(CONTRACTED_STEP, flash.MAX_GATED_DIM + 1, CONTRACTED_STEP):
        cases |= _flash_mlp("gated ", "silu", dim, ups=2)
    for dim in range(CONTRACTED_STEP, LARGEST_FLASH_RANK + 1, CONTRACTED_STEP):
        cases |= _flash_mlp("pair ", "silu", dim, ups=2, inputs=2)
        cases |= _flash_mlp("relu2 ", "relu2", dim, ups=1)
    for activation in ACTIVATIONS:
        if activation != "silu":
            cases |= _flash_mlp(f"{activation} ", activation, 64, ups=1)
            cases |= _flash_mlp(f"{activation} gated ", activation, 64, ups=2)
    return cases


# Sizes of one layer of 7B, and a few tokens: (tokens, rank, hidden).
TOKENS, RANK, WIDTH = 2048, 1024, 16512
# The right factor lies transposed, and what is done to the result.
PACKED_PRODUCTS = ((True, "identity"), (False, "relu2"), (False, "identity"))


def matmul_cases() -> Cases:
    """Dense, with every epilogue: of low-rank MLPs."""
    cases = {}
    core, up, down = (TOKENS, RANK), (RANK, WIDTH), (WIDTH, RANK)
    hidden = TOKENS, WIDTH

    def add(name, make, *shapes):
        cases[name] = partial(_case, make, *shapes)

    for columns in TILE_COLUMNS:
        add(f"relu2 forward {columns}", fused.relu2_forward(columns), core, up)
        make = fused.relu2_backward(columns)
        add(f"relu2 backward {columns}", make, core, down, hidden)
    pair = TOKENS, 2 * RANK
    for columns in GATED_COLUMNS:
        for keep, label in ((False, ""), (True, " kept")):
            make = fused.gated_forward(keep, columns)
            add(f"gated forward{label} {columns}", make, pair, up, up)
            add(f"swiglu forward{label} {columns}", make, core, up, up)
        make = fused.gated_backward(columns)
        add(f"gated backward {columns}", make, core, down, hidden, hidden)
    return cases


def sparse_cases() -> Cases:
    """2:4: selections, and products on sparse tensor cores."""
    cases = {}
    core, up, values = (TOKENS, RANK), (RANK, WIDTH), (TOKENS, WIDTH // 2)
    words = (TOKENS // 64, WIDTH // 64, 128), jnp.int32
    for columns in sparse.SELECT_COLUMNS:
        for shrink, method in ((False, "top2"), (True, "soft")):
            for keep, label in ((False, ""), (True, " kept")):
                make = sparse.select_forward(shrink, keep, columns)
                name = f"select {method}{label} {columns}"
                cases[name] = partial(_case, make, core, up)
    # Those that a packed MLP launches.
    for columns in TILE_COLUMNS:
        for transposed, activation in PACKED_PRODUCTS:
            make = sparse_matmul(transposed, activation, columns)
            right = up if transposed else up[::-1]
            kind = "sparse T" if transposed else "sparse"
            name = f"{kind} {activation} {columns}"
            cases[name] = partial(_case, make, values, words, right)
    return cases


@cache
def every_case() -> Cases:
    low_rank = matmul_cases() | sparse_cases()
    return flash_mlp_cases() | attention_cases() | masked_cases() | low_rank


def name_of(row: Row) -> str:
    """The name of a row's kernel in `every_case`."""
    return f"{row['op']} {row['variant']}".strip()


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


def measure(
    name: str,
    tools: Tools,
    stub: Path,
    known: Row | None = None,
    build: Callable[[], Any] | None = None,
) -> Row:
    """One row; a kernel that fails is a failed row.

    known: an earlier row, which stays where the module is still the same.
    build: makes the function and its arguments; by default that of the name.
    """
    op, _, variant = name.partition(" ")
    row: Row = labels(op, variant, KERNEL, "compiled", jnp.dtype(jnp.bfloat16))
    try:
        fn, args = (build or every_case()[name])()
        (module,) = lower(fn, args)
        row["module"] = fingerprint(module)
        if known and row["module"] == known["module"]:
            return known
        kernel = compile_module(module, tools, stub)
        row |= figures(kernel)
        reason = kernel.problem()
    # Whatever a kernel raises is its result, and the others still run.
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line}"
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
    return _hash(
        package, [p for p in package.rglob("*.py") if apart.isdisjoint(p.parents)]
    )


def measuring(package: Path = PACKAGE) -> str:
    """A hash of the sources that compile a module and count what it needs.

    Without this, a row would stay as it is where what is wrong with it can now be seen.
    """
    return _hash(package, [package / "testing" / name for name in MEASURING])


def _hash(package: Path, files: Sequence[Path]) -> str:
    """A hash of these files by their names in the package, and of this one."""
    named = {str(path.relative_to(package)): path for path in files}
    named |= {"": Path(__file__)}
    digest = hashlib.sha256()
    for name, path in sorted(named.items()):
        digest.update(f"{name}\n".encode() + path.read_bytes())
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
        """By name, the rows that these compilers would give again, of the same
        modules."""
        if versions != self.versions:
            return {}
        return {
            name: row
            for name, row in self.rows.items()
            if row["status"] == "ok" and "module" in row
        }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("kernels"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", type=pattern, default="", metavar="REGEX", help="of the names")
    add("--all", action="store_true", help="compile what is unchanged too")
    text = "where the rows of earlier runs are, and this one's go (%(default)s)"
    add("--json", type=writable, default=str(RECORD), metavar="FILE", help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
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
    console = make_console()
    print_table(console, make_table([new.rows[name] for name in names]))
    failed = [row for row in new.rows.values() if row["status"] == "failed"]
    for row in failed:
        console.print(f"failed: {name_of(row)}: {row['reason']}", markup=False)
    compiled = sum(row != good.get(name_of(row)) for row in fresh.values())
    console.print(
        f"{len(names)} kernels in {time.perf_counter() - start:.0f} s: {compiled} "
        f"compiled, {len(names) - compiled} unchanged, {len(failed)} failed"
    )
    return int(bool(failed) or error is not None)


def make_table(rows: Sequence[Row]) -> Table:
    def count(column: str) -> Callable[[Row], str]:
        return lambda row: str(row.get(column, "-"))

    title = "compiled for sm_90a; counts are static, a loop counts once"
    return listing(title, rows, name_of, {k: count(c) for k, c in SHOWN.items()})


def save(path: Path, record: Record, new: Record) -> OSError | None:
    """Write the new rows, and the earlier ones that these compilers gave too.

    Kernels that there are no more have no row.
    """
    earlier = record.rows if record.versions == new.versions else {}
    rows = [row for n in every_case() if (row := new.rows.get(n) or earlier.get(n))]
    is_current = record.sources == new.sources or all(
        name_of(row) in new.rows for row in rows
    )
    meta = metadata("kernels", arch="sm_90a", versions=new.versions)
    results = Results(path, meta | {"sources": new.sources if is_current else None})
    results.rows, results.meta["complete"] = rows, len(rows) == len(every_case())
    results.save()
    return results.error


if __name__ == "__main__":
    run_program(main)
