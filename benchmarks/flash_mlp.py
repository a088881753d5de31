"""Is the multi-head MLP right, how fast is it, and how much memory does it take?

    python -m benchmarks.flash_mlp     the five published configurations, both passes

The published study (FlashMLP: PyTorch eager and its Triton kernel, bfloat16, on a GPU
it does not name) times forward, and forward and backward, and measures the memory they
allocate over that of weights and input. Floors are for one H200, from its data sheet.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxkern
from jaxkern import _flash_mlp_mgpu
from jaxkern._mgpu import on_hopper

from . import _torch
from ._cli import make_parser
from ._harness import (
    Case,
    Check,
    Options,
    Program,
    Row,
    Skip,
    check_against,
    matmul_peak_tflops,
    with_gradients,
)
from ._report import (
    execute,
    make_console,
    metadata,
    number,
    print_header,
    print_problems,
    print_table,
    published,
    table,
)

# Of an H200: dense bfloat16 matmuls, memory, and special function operations a second.
TENSOR_FLOPS, MEMORY_BYTES = 989e12, 4.8e12
MUFU_OPS = 132 * 16 * 1.83e9
FLOORS = ("tensor", "bytes", "mufu")
ITERATIONS = 100
CPU_ITERATIONS = 10


@dataclass(frozen=True)
class Shape:
    """One published configuration."""

    heads: int
    batch: int
    dim: int
    hidden: int

    def __str__(self) -> str:
        return f"({self.heads}, {self.batch}, {self.dim}, {self.hidden})"


PUBLISHED = {
    Shape(*(int(line[name]) for name in list(line)[:4])): line
    for line in published("flash_mlp")
}
CASES = list(PUBLISHED)
IMPLEMENTATIONS = ("mosaic_gpu", "xla", "plain jnp", *_torch.FRAMEWORKS)
PASSES = ("forward", "forward+backward")
# The published columns that answer ours: of time and of memory, eager and fused.
PUBLISHED_COLUMNS = {
    "forward": ("pytorch_fwd_ms", "triton_fwd_ms"),
    "forward+backward": ("pytorch_fwd_bwd_ms", "triton_fwd_bwd_ms"),
}
MEMORY_COLUMNS = {
    "forward": ("pytorch_fwd_alloc_mb", "triton_fwd_alloc_mb"),
    "forward+backward": ("pytorch_peak_mb", "triton_peak_mb"),
}


def plain(x, w1, w2):
    z = jnp.einsum("hbd,hde->hbe", x, w1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("hbe,hed->hbd", jax.nn.silu(z.astype(wide)).astype(x.dtype), w2)


def _torch_module(F, x, w1, w2):
    return F.silu(x @ w1) @ w2


def count_flops(shape: Shape, which: str) -> float:
    """Of the matmuls: two forward, and four more backward; none computed again."""
    matmul = 2.0 * shape.heads * shape.batch * shape.dim * shape.hidden
    return matmul * (2 if which == "forward" else 6)


def floors_ms(shape: Shape, which: str) -> dict[str, float]:
    """What one H200 cannot be faster than: by matmuls, by bytes, by activations.

    The backward of a kernel that keeps nothing computes the hidden layer again: five
    matmuls. Bytes: every argument read and every result written once, two bytes each.
    """
    matmul = 2.0 * shape.heads * shape.batch * shape.dim * shape.hidden
    tokens = shape.heads * shape.batch * shape.dim
    weights = 2 * shape.heads * shape.dim * shape.hidden
    elements = shape.heads * shape.batch * shape.hidden
    matmuls, numbers, activations = 2, 2 * tokens + weights, 1
    if which == "forward+backward":
        matmuls, numbers, activations = 7, numbers + 3 * tokens + 2 * weights, 2
    return {
        "tensor": 1e3 * matmuls * matmul / TENSOR_FLOPS,
        "bytes": 1e3 * 2 * numbers / MEMORY_BYTES,
        "mufu": 1e3 * activations * elements / MUFU_OPS,
    }


def make_inputs(shape: Shape, dtype: Any, seed: int) -> tuple[jax.Array, ...]:
    """As published: x ~ N(0, 1/dim), w1 ~ N(0, 1/hidden), w2 ~ N(0, 1/dim)."""
    h, b, d, e = shape.heads, shape.batch, shape.dim, shape.hidden
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes, scales = [(h, b, d), (h, d, e), (h, e, d), (h, b, d)], [d, e, d, 1]
    return tuple(
        jax.random.normal(key, shape, dtype) * jnp.asarray(scale**-0.5, dtype)
        for key, shape, scale in zip(keys, shapes, scales, strict=True)
    )


def check(fn: Any, args: tuple[jax.Array, ...], run: Any) -> Check:
    """All results against `fn` in float64."""
    with jax.enable_x64(True):
        wide = [a.astype(jnp.float64) for a in args]
        exact = jax.tree.map(np.asarray, jax.jit(fn)(*wide))
    return check_against(run(*args), jax.jit(fn)(*args), exact, args[0].dtype)


def build(implementation: str, shape: Shape, which: str, args) -> Program:
    x, w1, w2, dy = make_inputs(shape, args.dtype, args.seed)
    fn: Any = plain
    if implementation in ("mosaic_gpu", "xla"):
        fn = partial(jaxkern.flash_mlp, implementation=implementation)
    if implementation == "mosaic_gpu":
        reason = _flash_mlp_mgpu.unsupported(x, [w1], on_hopper=on_hopper())
        if reason:
            raise Skip(reason)
    definition, inputs, backward = plain, (x, w1, w2), which != "forward"
    if backward:
        fn, definition = with_gradients(fn), with_gradients(plain)
        inputs = (dy, *inputs)
    held = partial(check, definition, inputs)
    if implementation in _torch.FRAMEWORKS:
        return _torch.program(_torch_module, implementation, inputs, held, backward)
    return Program(fn, inputs, held)


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The rows to measure, in order."""
    left_out = () if _torch.frameworks(args.peers) else _torch.FRAMEWORKS
    cases = []
    for shape, line in PUBLISHED.items():
        for which in PASSES:
            for implementation in IMPLEMENTATIONS:
                if implementation in left_out:
                    continue
                fused = line[PUBLISHED_COLUMNS[which][1]]
                numbers = count_flops(shape, which) / shape.dim
                cases.append(
                    Case(
                        labels={"shape": str(shape), "pass": which}
                        | {"implementation": implementation},
                        build=partial(build, implementation, shape, which, args),
                        flops=count_flops(shape, which),
                        iterations=ITERATIONS if args.on_device else CPU_ITERATIONS,
                        # Of the float64 check, which is the largest part.
                        needed_bytes=8 * numbers,
                        published_ms=float(fused) if fused else None,
                    )
                )
    return cases


def allocated_mb(row: Row) -> float | None:
    """Results and intermediates (MiB), as the study counts: not weights and input."""
    if "temp_bytes" not in row:
        return None
    return (row["temp_bytes"] + row["output_bytes"]) / 2**20


def print_floors(console: Console) -> None:
    """Predicted: the time of matmuls, of memory and of activations alone."""
    title = "Floors on one H200, us (predicted): forward, then forward+backward"
    result = table(title, ["", *FLOORS, *FLOORS])
    for shape in PUBLISHED:
        cells = [
            number(1e3 * floors_ms(shape, which)[name])
            for which in PASSES
            for name in FLOORS
        ]
        result.add_row(str(shape), *cells)
    print_table(console, result)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    for which in PASSES:
        columns = ["", "ms", "± std", "% floor", "MiB", "eager", "fused", "fused MiB"]
        result = table(f"{which}: ours, and published eager and fused (ms)", columns)
        for shape, line in PUBLISHED.items():
            group = [r for r in rows if (r["shape"], r["pass"]) == (str(shape), which)]
            if not group:
                continue
            result.add_row(f"[bold]{shape}[/bold]")
            floors = floors_ms(shape, which)
            for row in group:
                result.add_row(f" {row['implementation']}", *_cells(row, line, floors))
        print_table(console, result)


def _cells(row: Row, line: Mapping[str, str], floors: Mapping[str, float]) -> list[str]:
    if row["status"] != "ok":
        return [row["status"]]
    eager, fused = (line[name] or "-" for name in PUBLISHED_COLUMNS[row["pass"]])
    memory = line[MEMORY_COLUMNS[row["pass"]][1]] or "-"
    device = row.get("device_ms")
    percent = number(100 * max(floors.values()) / device) if device else "-"
    mark = "*" if row["includes_compile"] else ""
    return [
        mark + number(device or row["time_ms"]),
        number(row["std_ms"], 2),
        percent,
        number(allocated_mb(row)),
        eager,
        fused,
        memory,
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("benchmarks.flash_mlp", __doc__ or "", full=False, plot=False)
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="PyTorch eager and compiled, where it is installed",
    )
    args = parser.parse_args(argv)
    args.on_device = jax.default_backend() != "cpu"
    args.dtype = jnp.dtype(args.dtype or ("bfloat16" if args.on_device else "float32"))
    return args


def describe(labels: Mapping[str, Any]) -> str:
    return f"{labels['shape']} {labels['pass']} {labels['implementation']}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    cases = make_cases(args)
    if args.list:
        print("\n".join(describe(case.labels) for case in cases))
        return 0
    precision = "highest" if args.dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        left_out = _torch.why_left_out(args.peers)
        calls = args.iterations or (ITERATIONS if args.on_device else CPU_ITERATIONS)
        meta = metadata(
            "flash_mlp",
            dtype=str(args.dtype),
            matmul_precision=precision,
            seed=args.seed,
            matmul_peak_tflops=matmul_peak_tflops(args.dtype),
            timing_text=f"{args.timing}, {calls} calls after {args.warmup} warm-ups",
            notes={"shapes": "(heads, batch, dim, hidden), silu"}
            | ({"PyTorch": f"left out: {left_out}"} if left_out else {}),
        )
        console = make_console()
        print_header(console, (__doc__ or "").splitlines()[0], meta)
        options = Options(args.warmup, args.iterations, args.timing)
        rows, status = execute(cases, options, meta, args.json, describe)
    print_floors(console)
    print_rows(console, rows)
    print_problems(console, rows, describe)
    return status


if __name__ == "__main__":
    sys.exit(main())
