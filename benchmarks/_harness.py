"""Check, warm up, time: one row at a time, none lost.

A benchmark lists `Case`s and calls `run`. Each case is built just before its row is
measured and freed after it, checked before it is timed, and ends as a dict with a
`status` ("ok", "failed" or "skipped") and, when not ok, a `reason`.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from jaxkern.testing import plain, relative_error

Row = dict[str, Any]
Timing = Literal["amortised", "per-call"]

# An amortised loop is cut into this many clocked stretches, to have a spread.
STRETCHES = 10
DEVICE_ITERATIONS = 10
PEAK_SIZE = 8192
# A matmul of so many rows and columns takes a fifth of a second on two cores.
CPU_PEAK_SIZE, CPU_PEAK_CALLS = 2048, 5


@dataclass(frozen=True)
class Check:
    """Relative error of the program's values, and what it must not exceed."""

    error: float
    bound: float


@dataclass(frozen=True)
class Program:
    """The program of a row.

    run: a function for `jax.jit`, or with `jit=False` one that is ready to be called.
    args: its arguments.
    check: from the compiled function to its error; called before anything is timed.
    block: waits for all outputs.
    fresh: with `jit=False`, makes a `run` that compiles in its first call; None if it
        never compiles.
    release: gives back what only the program's framework can.
    figures: what the harness cannot measure of it; called after the check.
    warmed: how often the check calls it with `args`: so many fewer warm-ups are left.
    ours: whether it may be skipped, as `skip_unsupported` does.
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    check: Callable[[Callable[..., Any]], Check]
    jit: bool = True
    block: Callable[[Any], Any] = jax.block_until_ready
    fresh: Callable[[], Callable[..., Any]] | None = None
    release: Callable[[], None] = lambda: None
    figures: Callable[[], Row] = dict
    warmed: int = 0
    ours: bool = False


@dataclass(frozen=True)
class Case:
    """One row to be.

    labels: the columns that tell it from other rows, as `labels` makes them.
    build: makes the program, or figures that need no clock; may raise `Skip`.
    flops: of one call, 0 where a rate says nothing.
    iterations: how many calls to time, unless the user says.
    needed_bytes: of arguments, outputs and intermediates, at most.
    published_ms: the published time, where there is one.
    warmup: calls before the clock starts, where rows differ in it.
    """

    labels: Mapping[str, Any]
    build: Callable[[], Program | Row]
    flops: float = 0.0
    iterations: int = 20
    needed_bytes: float = 0.0
    published_ms: float | None = None
    warmup: int | None = None


@dataclass(frozen=True)
class Options:
    """How to measure. With `iterations` None each case has its own number."""

    warmup: int = 5
    iterations: int | None = None
    timing: Timing = "amortised"


# Every row begins with these columns, so that rows of all files join.
COLUMNS = ("op", "variant", "by", "pass", "dtype")


def labels(
    op: str, variant: str, by: str, which: str, dtype: Any, **sizes: Any
) -> dict[str, Any]:
    """The columns that tell one row from all others, in every benchmark.

    op: the public name of what is computed.
    variant: which form of it, as a mask or an estimator; "" where there is one.
    by: who computes it: "jaxkern mosaic_gpu", "jaxkern xla", "cudnn", "torch sdpa".
    which: the pass: "forward", "backward", "forward+backward", "optimizer step".
    sizes: of the arguments, by the names that the library's own arguments have.
    """
    values = op, variant, by, which, str(dtype)
    return dict(zip(COLUMNS, values, strict=True)) | sizes


def name_of(row: Mapping[str, Any]) -> str:
    """The op and the variant."""
    return f"{row['op']} {row['variant']}".strip()


# By whom a row of ours is computed: by a kernel, by XLA, and by whichever None picks.
KERNEL, XLA, PICKED = "jaxkern mosaic_gpu", "jaxkern xla", "jaxkern"
PLAIN = "plain jnp"
FORWARD, BACKWARD, BOTH = PASSES = "forward", "backward", "forward+backward"


class Skip(Exception):
    """This row cannot be measured here, for the reason given."""


def skip_unsupported(fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Trace a program of ours; what its op cannot compute here is no failure.

    Raises:
        Skip: the op refuses its arguments, with the op's own reason.
    """
    try:
        jax.eval_shape(fn, *args)
    except NotImplementedError as error:
        raise Skip(str(error)) from None


def first_line(error: Exception) -> str:
    """The reason why a row failed."""
    line, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {line}"


class WrongValues(Exception):
    """The program does not compute what it should, so its time means nothing."""


def allowed_error(in_dtype: Any, exact: Any, dtype: Any) -> float:
    """Twice the error of the plain form in the same dtype, plus one rounding."""
    return 2 * relative_error(in_dtype, exact) + float(jnp.finfo(dtype).eps) / 2


def check_against(got: Any, in_dtype: Any, exact: Any, dtype: Any) -> Check:
    """Compare with the exact result, within `allowed_error`."""
    return Check(relative_error(got, exact), allowed_error(in_dtype, exact, dtype))


def in_both(dtype: Any, fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Results of a plain form for arguments in this dtype, and in float64."""
    in_dtype = jax.tree.map(np.asarray, jax.jit(fn)(*plain.cast(args, dtype)))
    return in_dtype, plain.in_float64(fn, *args)


def measure(program: Program, options: Options, iterations: int, row: Row) -> None:
    """Compile, check, warm up and time one program; fill the row as the figures come.

    Raises:
        WrongValues: the check failed; nothing was timed.
    """
    if program.jit:
        start = time.perf_counter()
        compiled = _unseen(program.run).lower(*program.args).compile()
        row["compile_s"] = time.perf_counter() - start
        row |= memory(compiled) | _device_peak(compiled, program.args)
        checked = compiled
    else:
        checked = program.run
    check = program.check(checked)
    row |= {"error": check.error, "error_bound": check.bound}
    # Written so that a NaN fails.
    if not check.error <= check.bound:
        raise WrongValues(
            f"wrong values: relative error {check.error:.2g}, allowed {check.bound:.2g}"
        )
    row |= program.figures()
    # Without warm-up the first call compiles, unless the program never does.
    compiles = not options.warmup and (program.jit or program.fresh is not None)
    fn = checked
    if compiles:
        fn = program.fresh() if program.fresh else _unseen(program.run)
    for _ in range(options.warmup - program.warmed):
        program.block(fn(*program.args))
    call = partial(fn, *program.args)
    row |= clock(call, program.block, iterations, options.timing)
    row["includes_compile"] = compiles
    # The median, which one interruption does not move, would hide a compilation too.
    row["time_ms"] = row["mean_ms"] if compiles else row["median_ms"]
    if program.jit and jax.default_backend() == "gpu":
        row |= device_time(checked, program.args)


def _unseen(fn: Callable[..., Any]) -> Any:
    """Jitted as a function of its own, of which JAX has nothing in its caches."""
    return jax.jit(lambda *args: fn(*args))


def memory(compiled: jax.stages.Compiled) -> Row:
    """Bytes of arguments, results and temporaries, as XLA plans them."""
    stats = compiled.memory_analysis()
    if stats is None:
        return {}
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
    }


def _device_peak(fn: Callable[..., Any], args: tuple[Any, ...]) -> Row:
    """How far one call lifts the allocator's peak over what is allocated before it.

    Null where the peak of the process, which cannot be reset, hides this one.
    """
    device = jax.devices()[0]
    before = device.memory_stats()
    if not before:
        return {}
    jax.block_until_ready(fn(*args))
    peak = (device.memory_stats() or {})["peak_bytes_in_use"]
    rose = peak > before["peak_bytes_in_use"]
    return {"peak_bytes": peak - before["bytes_in_use"] if rose else None}


def clock(
    call: Callable[[], Any],
    block: Callable[[Any], Any],
    iterations: int,
    timing: Timing,
) -> Row:
    """Time so many calls, in stretches; per call, a stretch is one call."""
    count = iterations if timing == "per-call" else min(STRETCHES, iterations)
    samples = []
    for stretch in np.array_split(np.arange(iterations), count):
        start = time.perf_counter()
        for _ in range(len(stretch) - 1):
            call()
        block(call())
        samples.append((len(stretch), time.perf_counter() - start))
    return _summary(samples)


def _summary(samples: list[tuple[int, float]]) -> Row:
    """Milliseconds a call; the spread is that of the stretches, as is the median."""
    calls = sum(n for n, _ in samples)
    times = [1e3 * seconds / n for n, seconds in samples]
    return {
        "iterations": calls,
        "samples": len(samples),
        "mean_ms": 1e3 * sum(seconds for _, seconds in samples) / calls,
        "std_ms": statistics.stdev(times) if len(times) > 1 else None,
        "median_ms": statistics.median(times),
        "min_ms": min(times),
    }


def device_time(fn: Callable[..., Any], args: tuple[Any, ...]) -> Row:
    """Time of the kernels alone (CUPTI), without launch gaps."""
    try:
        _, times = profiler.measure(fn, iterations=DEVICE_ITERATIONS)(*args)
    except RuntimeError as error:
        return {"device_ms": None, "device_ms_reason": str(error)}
    return {"device_ms": statistics.median(times) if times else None}


def matmul_peak_tflops(dtype: Any, on_cpu: bool = False) -> float | None:
    """Rate of a large matmul on random data, in this run.

    Without the time of the kernels alone it is the best of a few calls. It is None on a
    CPU unless it is wanted there.
    """
    on_gpu = jax.default_backend() == "gpu"
    if not (on_gpu or on_cpu):
        return None
    size, calls = (PEAK_SIZE, 20) if on_gpu else (CPU_PEAK_SIZE, CPU_PEAK_CALLS)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    milliseconds = device_time(compiled, (a, b))["device_ms"] if on_gpu else None
    if milliseconds is None:
        call = partial(compiled, a, b)
        jax.block_until_ready(call())
        figures = clock(call, jax.block_until_ready, calls, "amortised")
        milliseconds = figures["min_ms"]
    return 2 * size**3 / milliseconds / 1e9


def available_bytes() -> float:
    """Bytes that may be allocated now on the first device."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _run_case(
    case: Case, options: Options, peak_tflops: float | None, row: Row
) -> None:
    available = available_bytes()
    if case.needed_bytes > available:
        raise Skip(
            f"needs {case.needed_bytes / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are free"
        )
    if case.warmup is not None:
        options = replace(options, warmup=case.warmup)
    program = case.build()
    if isinstance(program, dict):
        row |= program
        return
    if program.ours:
        skip_unsupported(program.run, program.args)
    try:
        measure(program, options, options.iterations or case.iterations, row)
    finally:
        program.release()
    if case.flops:
        row["rate_from"] = "device_ms" if row.get("device_ms") else "time_ms"
        row["tflops"] = case.flops / row[row["rate_from"]] / 1e9
        if peak_tflops:
            row["percent_of_peak"] = 100 * row["tflops"] / peak_tflops


def run(
    cases: Iterable[Case],
    options: Options,
    *,
    peak_tflops: float | None = None,
    on_start: Callable[[Case], None] = lambda case: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure every case; what a case raises ends its row, not the run.

    `on_row` sees each row when it is done, so that an interrupt loses none of them.
    """
    rows = []
    # Without this, a collection after each row would walk through all that stays.
    gc.freeze()
    for case in cases:
        on_start(case)
        row: Row = {**case.labels, "status": "ok", "reason": None}
        row |= {"flops": case.flops, "published_ms": case.published_ms}
        try:
            _run_case(case, options, peak_tflops, row)
        except Skip as skip:
            row |= {"status": "skipped", "reason": str(skip)}
        # Whatever a row raises is that row's result, and the others still run.
        except Exception as error:
            row |= {"status": "failed", "reason": first_line(error)}
        rows.append(row)
        on_row(row)
        gc.collect()
    return rows
