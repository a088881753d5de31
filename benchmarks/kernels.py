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
import numpy as np

from jaxkern import BlockMask
from jaxkern._attention.block_mask.mask import with_keys
from jaxkern._attention.dilation import Dilation
from jaxkern._attention.hopper import attend as _block_sparse_mgpu
from jaxkern._core.activations import ACTIVATIONS
from jaxkern._masked.hopper import gradients as _masked_gradients
from jaxkern._masked.hopper import product as _masked_product
from jaxkern._masked.packed import WORD
from jaxkern._mlp.hopper import flash, fused, sparse
from jaxkern._mosaic.matmul import COLUMNS, GATED_COLUMNS
from jaxkern._sparsity.hopper.product import sparse_matmul

from ._cli import pattern, run_program, writable
from ._harness import Row
from jaxkern.testing.compiler import (
    MissingCompiler,
    build_stub,
    compile_module,
    lower,

    tools,
)
from ._report import Results, make_console, metadata, print_table, table

HEADS, BATCH, HIDDEN, SEQ = 16, 2048, 1024, 2048
Cases = dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]]
WORKERS = 2
SHOWN = {
    "regs": "registers",
    "spill B": "spill_stores_bytes",
    "SMEM B": "smem_bytes",
    "wgmma": "wgmma",
    "MUFU": "mufu",
    "instr.": "instructions",
}


def _flash_mlp(
    make: Callable[..., Any], dim: int, ups: int, backward: bool, inputs: int
):
    up, down, tokens = (dim, HIDDEN), (HIDDEN, dim), (BATCH, dim)
    x = BATCH, inputs * dim
    shapes = [x, *[up] * ups, down, *[tokens] * backward]
    args = [jax.ShapeDtypeStruct((HEADS, *s), jnp.bfloat16) for s in shapes]
    return make(), tuple(args)


def _attention(
    kernel: str,
    wanted: tuple[str, ...] | None,
    dim: int,
    mask: Callable[[], BlockMask],
    rate: int = 1,
):
    """With two query heads a key head, of two batches."""
    kernels = _block_sparse_mgpu
    query, key, d_out, numbers = (
        jax.ShapeDtypeStruct((2, *shape), dtype)
        for shape, dtype in [
            ((SEQ, rate * 4, dim), jnp.bfloat16),
            ((SEQ, rate * 2, dim), jnp.bfloat16),
            ((SEQ, 4, dim), jnp.bfloat16),
            ((4, 2, SEQ), jnp.float32),
        ]
    )
    inputs = query, key, key
    scale = dim**-0.5
    match kernel:
        case "forward":
            run = partial(kernels.forward, exact=True)
        case "backward_q":
            run = kernels.backward_q
        case _:
            run = partial(kernels.backward_kv, wanted=wanted or ())
    dilation = Dilation(rate, heads=4, run=2) if rate > 1 else None
    run = partial(run, mask=mask(), scale=scale, dilation=dilation)
    return run, inputs if kernel == "forward" else (*inputs, d_out, numbers)


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
            launches = _block_sparse_mgpu.kv_launches(dim)
            wanted = [("forward", None), ("backward_q", None)]
            wanted += [("backward_kv", x) for x in launches]
            for kernel, grads in wanted:
                label = {"forward": "forward", "backward_q": "dq"}.get(kernel, "")
                label = label or " ".join(f"d{x[0]}" for x in grads or ())
                cases[f"attention {label} {dim} {name}"] = partial(
                    _attention, kernel, grads, dim, mask, rate
                )
    return cases


def _masked(make: Callable[..., Any], kind: str, dtype: Any, wide: tuple[int, ...]):
    """Of four samples with 256 tokens, of `wide` features each."""
    samples, seq, d_in, d_out = 4, 256, 512, 2048
    rows = d_in // WORD if kind == "bits" else d_in
    arrays = [((samples, seq, n), jnp.bfloat16) for n in wide]
    arrays += [((1, d_in, d_out), jnp.bfloat16), ((samples, rows, d_out), dtype)]
    return make, tuple(jax.ShapeDtypeStruct(*a) for a in arrays)


def masked_cases() -> Cases:
    """Every configuration, and every kind of mask: of 32 bits, of 16, and packed."""
    kernels, cases = _masked_product, {}
    configs = [kernels.MaskedTiles(n, k) for n in kernels.TOKENS for k in (1, 2)]
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
                size = f"{config.tokens}{' split' * (config.splits > 1)}"
                cases[f"masked {label} {size} {name}"] = partial(
                    _masked, make, kind, dtype, (features,)
                )
    all_three = {"dw": (False, True), "dmask": (True, False), "dmask dw": (True, True)}
    # Straight-through's masks alone are not read, and the others are as bits.
    gradients = {kind: (dtype, all_three) for _, kind, dtype, _ in (of_masks, of_bits)}
    gradients["straight_through"] = jnp.float32, {"dmask": (True, False)}
    sloped = {label: all_three[label] for label in ("dmask", "dmask dw")}
    gradients |= {kind: (jnp.float32, sloped) for kind in ("seed_reinmax", "reinmax")}
    for kind, (dtype, wanted) in gradients.items():
        made = jnp.float32 if kind == "bits" else dtype
        for label, (mask, w) in wanted.items():
            of = _masked_gradients.Wanted(False, w, mask, made)
            make = _masked_gradients.gradients_kernel(kind, of)
            cases[f"masked {label} {of.columns} {kind}"] = partial(
                _masked, make, kind, dtype, (512, 2048)
            )
    return cases


def flash_mlp_cases() -> Cases:
    """Every configuration that can be chosen."""
    kernels, cases = flash, {}

    def add(label, kernel, dim, ups, activation, *wanted, inputs=1):
        make = getattr(kernels, kernel)
        configs = kernels.configs(kernel, dim, ups, inputs)
        # The largest tile leaves the fewest registers to an activation.
        for config in configs if activation == "silu" else configs[:1]:
            size = f"{config.rows}x{config.columns}{' split' * config.split}"
            build = partial(make, activation, *wanted, config)
            backward = kernel != "forward"
            cases[f"flash_mlp {label} {dim} {size}"] = partial(
                _flash_mlp, build, dim, ups, backward, inputs
            )

    def add_all(label, dim, ups, activation, inputs=1):
        add(f"{label}forward", "forward", dim, ups, activation, inputs=inputs)
        for wanted in kernels.input_passes(dim, inputs):
            name = "dx" if inputs == 1 else " ".join(f"dx{n}" for n in wanted)
            args = f"{label}{name}", "backward_x", dim, ups, activation, wanted
            add(*args, inputs=inputs)
        for wanted in kernels.weight_passes(dim, ups):
            names = ("gate", "w1", "w2")[-ups - 1 :]
            name = " ".join(f"d{names[n]}" for n in wanted)
            args = f"{label}{name}", "backward_w", dim, ups, activation, wanted
            add(*args, inputs=inputs)

    for dim in range(16, kernels.MAX_DIM + 1, 16):
        add_all("", dim, 1, "silu")
    for dim in range(32, kernels.MAX_GATED_DIM[1] + 1, 32):
        add_all("gated ", dim, 2, "silu")
    for dim in range(32, kernels.MAX_GATED_DIM[2] + 1, 32):
        add_all("pair ", dim, 2, "silu", inputs=2)
    for activation in ACTIVATIONS:
        if activation != "silu":
            add_all(f"{activation} ", 64, 1, activation)
    return cases


# Of one layer of 7B, and a few tokens: (tokens, rank, hidden).
TOKENS, RANK, WIDTH = 2048, 1024, 16512
# The right factor lies transposed, and what is done to the result.
PACKED_PRODUCTS = ((True, "identity"), (False, "relu2"), (False, "identity"))


def _low_rank(make: Callable[..., Any], *shapes: tuple[int, ...], words: bool = False):
    """With a core, weights and hidden features of those shapes, in 16 bits."""
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    if words:
        blocks = shapes[0][0] // 64, shapes[0][1] // 32, 128
        args.insert(1, jax.ShapeDtypeStruct(blocks, jnp.int32))
    return make, tuple(args)


def matmul_cases() -> Cases:
    """Dense, with every epilogue: of low-rank MLPs."""
    kernels, cases = fused, {}
    core, up, down = (TOKENS, RANK), (RANK, WIDTH), (WIDTH, RANK)
    hidden = TOKENS, WIDTH

    def add(name, make, *shapes):
        cases[name] = partial(_low_rank, make, *shapes)

    for columns in COLUMNS:
        add(f"relu2 forward {columns}", kernels.relu2_forward(columns), core, up)
        make = kernels.relu2_backward(columns)
        add(f"relu2 backward {columns}", make, core, down, hidden)
    pair = TOKENS, 2 * RANK
    for columns in GATED_COLUMNS:
        for keep, label in ((False, ""), (True, " kept")):
            make = kernels.gated_forward(keep, columns)
            add(f"gated forward{label} {columns}", make, pair, up, up)
            add(f"swiglu forward{label} {columns}", make, core, up, up)
        make = kernels.gated_backward(columns)
        add(f"gated backward {columns}", make, core, down, hidden, hidden)
    return cases


def sparse_cases() -> Cases:
    """2:4: selections, and products on sparse tensor cores."""
    cases = {}
    core, up, values = (TOKENS, RANK), (RANK, WIDTH), (TOKENS, WIDTH // 2)
    for columns in sparse.SELECT_COLUMNS:
        for shrink, method in ((False, "top2"), (True, "soft")):
            for keep, label in ((False, ""), (True, " kept")):
                make = sparse.select_forward(shrink, keep, columns)
                name = f"select {method}{label} {columns}"
                cases[name] = partial(_low_rank, make, core, up)
    # Those that a packed MLP launches.
    for columns in COLUMNS:
        for transposed, activation in PACKED_PRODUCTS:
            make = sparse_matmul(transposed, activation, columns)
            right = up if transposed else up[::-1]
            name = f"sparse{' T' if transposed else ''} {activation} {columns}"
            cases[name] = partial(_low_rank, make, values, right, words=True)
    return cases


def every_case() -> Cases:
    low_rank = matmul_cases() | sparse_cases()
    return flash_mlp_cases() | attention_cases() | masked_cases() | low_rank


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
    cases = {n: b for n, b in every_case().items() if re.search(args.only, n)}
    results = Results(args.json, metadata("kernels", arch="sm_90a"))
    console = make_console()
    title = "compiled for sm_90a; counts are static, a loop counts once"
    result = table(title, ["", *SHOWN])
    # A long name takes two lines, so that no figure is cut off.
    result.columns[0].no_wrap = False
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as stub, ThreadPoolExecutor(WORKERS) as pool:
        build_stub(Path(stub))
        tools = plugin, disassembler, Path(stub)
        rows = pool.map(lambda case: measure(case[0], case[1], tools), cases.items())
        for row in rows:
            results.add(row)
            cells = [str(row.get(field, "-")) for field in SHOWN.values()]
            result.add_row(row["kernel"], *cells)
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
    run_program(main)
