"""Run Mosaic GPU kernels on the CPU, with race detection that knows wgmma.

    with interpret():
        y = jax.block_until_ready(jax.jit(op)(x))     # a race raises RaceError

JAX's own interpret mode emulates barriers, TMA and memory spaces and their races. This
adds what our kernels use beyond it, so that they need no branch for it:

- accumulators that start from a value (`pl.run_state` on `plgpu.ACC.init`);
- `plgpu.wgmma` with its left operand in registers;
- functions for `plgpu.inline_mgpu` that say what they compute (`fn.emulated`), in jnp;
- races of wgmma: its reads of SMEM stay pending until they are awaited, so a slot that
  is released or refilled too early is found, and so is a missing `commit_smem`;
- a barrier nobody arrives at is an error that names the line, after a while;
- so is a copy that does not stop at the end of a row (mgpu_copies.py).

It is also faster than JAX's: a kernel is compiled once and not in each thread at once,
and callbacks get NumPy arrays as they come.

It replaces private functions of JAX, and says so where they have moved. JAX caches
traces: inside `interpret`, call a fresh `jax.jit`.
"""

import contextlib
import logging
import re
import threading
import types
from typing import Any
from unittest import mock

import jax
import mgpu_copies
import mgpu_tensor_cores as cores
import numpy as np
from jax._src import callback, source_info_util
from jax._src import core as jax_core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import discharge
from jax.experimental.pallas import mosaic_gpu as plgpu

cb: Any = gpu_callbacks
Interpreter: Any = jaxpr_interpret.JaxprInterpreter
TOKEN = cb.TOKEN_SHAPE_DTYPE
DEADLOCK_SECONDS = 20.0


class RaceError(AssertionError):
    """Two accesses of shared memory that nothing orders."""


_SPECIAL = {
    discharge.run_state_p: cores.interpret_run_state,
    primitives.wgmma_accumulator_store_p: cores.interpret_store,
    primitives.wgmma_wait_p: cores.interpret_wait,
}
_upstream_interpret = Interpreter.interpret


def _split(eqns):
    """Into runs of ordinary equations and single special ones."""
    groups = []
    for eqn in eqns:
        special = eqn.primitive in _SPECIAL
        if special or not groups or groups[-1][0].primitive in _SPECIAL:
            groups.append([eqn])
        else:
            groups[-1].append(eqn)
    return groups


def _variables(eqns, field):
    kinds = (jax_core.Literal, jax_core.DropVar)
    found = (v for eqn in eqns for v in getattr(eqn, field) if not isinstance(v, kinds))
    return list(dict.fromkeys(found))


def _interpret(self, jaxpr, token, *args):
    """Ordinary equations the way JAX does them, special ones ours."""
    if not any(eqn.primitive in _SPECIAL for eqn in jaxpr.eqns):
        return _upstream_interpret(self, jaxpr, token, *args)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))

    def value(v):
        return v.val if isinstance(v, jax_core.Literal) else env[v]

    groups = _split(jaxpr.eqns)
    results = {v for v in jaxpr.outvars if not isinstance(v, jax_core.Literal)}
    for i, group in enumerate(groups):
        special = _SPECIAL.get(group[0].primitive)
        if special is not None:
            invals = [value(v) for v in group[0].invars]
            token, outs = special(self, group[0], token, invals)
            env.update(zip(group[0].outvars, outs, strict=True))
            continue
        later = results.union(*(_variables(g, "invars") for g in groups[i + 1 :]))
        defined = _variables(group, "outvars")
        ins = [v for v in _variables(group, "invars") if v not in set(defined)]
        outvars = [v for v in defined if v in later]
        part = types.SimpleNamespace(
            constvars=[], invars=ins, outvars=outvars, eqns=group
        )
        token, outs = _upstream_interpret(self, part, token, *[env[v] for v in ins])
        env.update(zip(outvars, outs, strict=True))
    return token, [value(v) for v in jaxpr.outvars]


class _Condition(threading.Condition):
    def wait(self, timeout=None):
        limit = DEADLOCK_SECONDS if timeout is None else timeout
        if not super().wait(limit):
            raise TimeoutError(f"DEADLOCK? waited {limit:g} s")
        return True


_upstream_barrier_init = memory.Barrier.__init__
_upstream_barrier_wait = memory.Barrier.wait


def _barrier_init(self, *args, **kwargs):
    _upstream_barrier_init(self, *args, **kwargs)
    self.cv = _Condition()


def _barrier_wait(self, thread, logging_info=None):
    try:
        return _upstream_barrier_wait(self, thread, logging_info)
    except TimeoutError as error:
        info: Any = getattr(logging_info, "source_info", None)
        where = source_info_util.summarize(info) if info is not None else "?"
        message = f"{error} in barrier_wait at {where} ({thread})"
        raise TimeoutError(message) from None


_compiled = {}
_compiling = threading.Lock()


def _run_jaxpr(jaxpr, consts, *args):
    """Each thread's share of a kernel; JAX's own compiles it in all of them at once."""
    with _compiling:
        if jaxpr not in _compiled:
            run = jax.jit(thread_map._run, static_argnums=0)
            _compiled[jaxpr] = run.lower(jaxpr, consts, *args).compile()
    _compiled[jaxpr](consts, *args)


def _io_callback(*args, result_avals, callback, sharding, ordered):
    """JAX's own makes a device's array of each argument, most of them one number."""
    args = [np.asarray(x) for x in args]
    is_number = [not x.ndim and x.dtype.kind == "i" for x in args]
    args = [x.item() if y else x for x, y in zip(args, is_number, strict=True)]
    return [np.asarray(x) for x in callback(*args)]


def _install():
    replaced = {
        "interpret": _interpret,
        "_interpret_wgmma_ref_p": cores.interpret_wgmma,
        "_interpret_wgmma_accumulator_deref_p": cores.interpret_deref,
        "_interpret_inline_mgpu_p": cores.interpret_inline,
        "_interpret_copy_smem_to_gmem_p": mgpu_copies.interpret_store,
        "_interpret_copy_gmem_to_smem_p": mgpu_copies.interpret_load,
    }
    for name, function in replaced.items():
        if not hasattr(Interpreter, name):
            raise RuntimeError(f"jax {jax.__version__} has no JaxprInterpreter.{name}")
        setattr(Interpreter, name, function)
    barrier: Any = memory.Barrier
    barrier.__init__, barrier.wait = _barrier_init, _barrier_wait


def _shortened(error: Exception) -> Exception:
    """The message that matters, out of the callbacks' nested tracebacks."""
    text = str(error)
    if "RACE DETECTED" in text:
        return RaceError(text[text.rindex("RACE DETECTED") :].split("\n\n")[0])
    if deadlock := re.search(r"DEADLOCK\?.*", text):
        return RuntimeError(deadlock.group(0))
    lines = [
        line
        for line in text.splitlines()
        if re.match(r"\w*(Error|Exception)\b", line)
        and "Computation failed" not in line
        and "CpuCallback" not in line
    ]
    return RuntimeError(f"interpreted kernel failed: {lines[-1]}") if lines else error


@contextlib.contextmanager
def interpret():
    """Every `plgpu.kernel` traced inside runs here, and its races are errors."""
    _install()
    cores.pending.clear()
    # Each failure would be logged five times.
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
    parameters = plgpu.InterpretGPUParams(detect_races=True)
    _compiled.clear()
    try:
        with (
            plgpu.force_gpu_interpret_mode(parameters),
            mock.patch.object(thread_map, "_run_jaxpr", _run_jaxpr),
            mock.patch.object(callback, "io_callback_impl", _io_callback),
        ):
            yield
        # jax 0.11 prints races and goes on; 0.12 raises.
        races = cb._races
        if races is not None and races.races_found:
            raise RaceError("RACE DETECTED, see stdout")
    except Exception as error:
        short = _shortened(error)
        if short is error:
            raise
        raise short from None
    finally:
        with contextlib.suppress(Exception):
            cb.reset_gpu_interpret_mode_state()
