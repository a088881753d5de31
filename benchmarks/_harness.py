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
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

Row = dict[str, Any]
Timing = Literal["amortised", "per-call"]

# An amortised loop is cut into this many clocked stretches, to have a spread.
STRETCHES = 5
DEVICE_ITERATIONS = 10
PEAK_SIZE = 8192


@dataclass(frozen=True)
class Check:
    """Relative error of the program's values, and what it must not exceed."""

    error: float
    bound: float


@dataclass(frozen=True)
class Program:
    """What a row runs.

    run: a function for `jax.jit`, or with `jit=False` one that is ready to be called.
    args: its arguments.
    check: from the compiled function to its error; called before anything is timed.
    block: waits for all outputs.
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    check: Callable[[Callable[..., Any]], Check]
    jit: bool = True
    block: Callable[[Any], Any] = jax.block_until_ready


@dataclass(frozen=True)
class Case:
    """One row to be.

    labels: the columns that tell it from other rows.
    build: makes the program; may raise `Skip`.
    flops: of one call, 0 where a rate says nothing.
    iterations: how many calls to time, unless the user says.
    needed_bytes: of arguments, outputs and intermediates, at most.
    published_ms: the published time, where there is one.
    """

    labels: Mapping[str, str | int]
    build: Callable[[], Program]
    flops: float = 0.0
    iterations: int = 20
    needed_bytes: float = 0.0
    published_ms: float | None = None


@dataclass(frozen=True)
class Options:
    """How to measure. With `iterations` None each case has its own number."""

    warmup: int = 5
    iterations: int | None = None
    timing: Timing = "amortised"


class Skip(Exception):
    """This row cannot be measured here, for the reason given."""


class WrongValues(Exception):
    """The program does not compute what it should, so its time means nothing."""


def relative_error(got: Any, exact: Any) -> float:
    """Norm of the difference over that of `exact`; the largest of the leaves."""

    def error(a, b):
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    # np.max and not max(), which may drop a NaN.
    return float(np.max([error(a, b) for a, b in pairs]))


def check_against(got: Any, plain: Any, exact: Any, dtype: Any) -> Check:
    """Allow twice the error of the plain form in the same dtype, plus one rounding."""
    rounding = float(jnp.finfo(dtype).eps) / 2
    bound = 2 * relative_error(plain, exact) + rounding
    return Check(relative_error(got, exact), bound)


def measure(program: Program, options: Options, iterations: int) -> Row:
    """Compile, check, warm up and time one program.

    Raises:
        WrongValues: the check failed; nothing was timed.
    """
    row: Row = {}
    fn = program.run
    if program.jit:
        start = time.perf_counter()
        compiled = jax.jit(fn).lower(*program.args).compile()
        row["compile_s"] = time.perf_counter() - start
        row |= _memory(compiled)
        # With no warm-up the first call is to compile: a function JAX has not seen.
        fn = compiled if options.warmup else jax.jit(lambda *args: program.run(*args))
        checked = compiled
    else:
        checked = fn
    row |= _verify(program, checked)
    peak = _DevicePeak()
    for _ in range(options.warmup):
        program.block(fn(*program.args))
    call = partial(fn, *program.args)
    row |= _summary(_time(call, program.block, iterations, options.timing))
    row["iterations"] = iterations
    row["includes_compile"] = options.warmup == 0
    # The median, which one interruption does not move, would hide a compilation too.
    row["time_ms"] = row["median_ms"] if options.warmup else row["mean_ms"]
    row |= peak.over_baseline()
    if program.jit and jax.default_backend() == "gpu":
        row |= _device_time(fn, program.args)
    return row


def _verify(program: Program, fn: Callable[..., Any]) -> Row:
    check = program.check(fn)
    # Written so that a NaN fails.
    if not check.error <= check.bound:
        raise WrongValues(
            f"wrong values: relative error {check.error:.2g}, allowed {check.bound:.2g}"
        )
    return {"error": check.error, "error_bound": check.bound}


def _memory(compiled: jax.stages.Compiled) -> Row:
    stats = compiled.memory_analysis()
    if stats is None:
        return {}
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
    }


class _DevicePeak:
    """How far the allocator's peak rises over what is allocated already."""

    def __init__(self):
        self.device = jax.devices()[0]
        stats = self.device.memory_stats() or {}
        self.baseline = stats.get("bytes_in_use")
        self.peak = stats.get("peak_bytes_in_use")

    def over_baseline(self) -> Row:
        """Null where an earlier row's peak, which cannot be reset, hides this one's."""
        if self.baseline is None or self.peak is None:
            return {}
        peak = (self.device.memory_stats() or {})["peak_bytes_in_use"]
        rose = peak > self.peak
        return {"peak_bytes_over_baseline": peak - self.baseline if rose else None}


def _time(
    call: Callable[[], Any],
    block: Callable[[Any], Any],
    iterations: int,
    timing: Timing,
) -> list[float]:
    """Seconds a call: one sample a call, or one a stretch of calls."""
    count = iterations if timing == "per-call" else min(STRETCHES, iterations)
    stretches = [len(s) for s in np.array_split(np.arange(iterations), count)]
    samples = []
    for calls in stretches:
        start = time.perf_counter()
        for _ in range(calls - 1):
            call()
        block(call())
        samples.append((time.perf_counter() - start) / calls)
    return samples


def _summary(samples: list[float]) -> Row:
    times = [1e3 * s for s in samples]
    return {
        "mean_ms": statistics.fmean(times),
        "std_ms": statistics.stdev(times) if len(times) > 1 else None,
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "samples": len(times),
    }


def _device_time(fn: Callable[..., Any], args: tuple[Any, ...]) -> Row:
    """Time of the kernels alone (CUPTI), without launch gaps."""
    try:
        _, times = profiler.measure(fn, iterations=DEVICE_ITERATIONS)(*args)
    except RuntimeError as error:
        return {"device_ms": None, "device_ms_reason": str(error)}
    return {"device_ms": statistics.median(times) if times else None}


def matmul_peak_tflops() -> float | None:
    """bfloat16 matmul rate on random data in this run; None without a GPU."""
    if jax.default_backend() != "gpu":
        return None
    shape = (PEAK_SIZE, PEAK_SIZE)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    milliseconds = _device_time(compiled, (a, b))["device_ms"]
    if milliseconds is None:
        call = partial(compiled, a, b)
        times = _time(call, jax.block_until_ready, 20, "amortised")
        milliseconds = 1e3 * statistics.median(times)
    return 2 * PEAK_SIZE**3 / milliseconds / 1e9


def available_bytes() -> float:
    """What may be allocated now on the first device."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    pages = (
        "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    )
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _run_case(case: Case, options: Options, peak_tflops: float | None) -> Row:
    available = available_bytes()
    if case.needed_bytes > available:
        raise Skip(
            f"needs {case.needed_bytes / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are free"
        )
    row = measure(case.build(), options, options.iterations or case.iterations)
    if case.flops:
        milliseconds = row.get("device_ms") or row["time_ms"]
        row["tflops"] = case.flops / milliseconds / 1e9
        if peak_tflops:
            row["percent_of_peak"] = 100 * row["tflops"] / peak_tflops
    return row


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
    for case in cases:
        on_start(case)
        row: Row = {
            **case.labels,
            "flops": case.flops,
            "published_ms": case.published_ms,
        }
        try:
            row |= {"status": "ok", "reason": None}
            row |= _run_case(case, options, peak_tflops)
        except Skip as skip:
            row |= {"status": "skipped", "reason": str(skip)}
        # Whatever a row raises is that row's result, and the others still run.
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            row |= {
                "status": "failed",
                "reason": f"{type(error).__name__}: {first_line}",
            }
        rows.append(row)
        on_row(row)
        gc.collect()
    return rows
