"""Extend JAX's interpret mode of Mosaic GPU kernels by what it lacks.

JAX's mode emulates barriers, TMA, memory spaces and their races. This adds:

- accumulators that start from a value (`pl.run_state` on `plgpu.ACC.init`);
- `plgpu.wgmma` with its left factor in registers;
- functions for `plgpu.inline_mgpu`, by their meaning in jnp (meanings.py);
- races of wgmma: its reads of SMEM stay pending until they are awaited, so that a slot
  which is released or refilled too early is found, and a missing `commit_smem` too
  (tensor_cores.py);
- an error for a barrier at which nobody can arrive any more, which names the line that
  waits (deadlocks.py);
- an error for a bulk copy past the end of a row (copies.py).

It is also faster than JAX's mode: a thread's program is evaluated and not compiled
(evaluate.py), and callbacks get NumPy arrays without a detour.

It replaces private functions of JAX while it is on, and raises an error if JAX has no
function of that name.
"""

import contextlib
import logging
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax._src import callback
from jax._src import core as jax_core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import discharge
from jax.experimental.pallas import mosaic_gpu

from . import copies, deadlocks
from . import tensor_cores as cores
from .errors import DeadlockError, RaceError
from .evaluate import as_given, evaluate, forget
from .meanings import MEANINGS

plgpu: Any = mosaic_gpu
cb: Any = gpu_callbacks
Interpreter: Any = jaxpr_interpret.JaxprInterpreter

Meanings = Mapping[Any, Callable[..., Any]]


@dataclass(frozen=True, kw_only=True)
class Parameters(mosaic_gpu.InterpretGPUParams):
    """JAX's parameters, and the meanings of inline functions as pairs.

    JAX hashes the parameters, so this is no dictionary.
    """

    meanings: tuple[tuple[Any, Callable[..., Any]], ...] = ()


# Vector clocks for TMA copies, which JAX hands out in turns. With JAX's default of
# five, a copy shares its clock with the fifth copy before it, and a race between
# threads that wait for either copy is not seen. More clocks take no more time.
COPIES = 1024

_SPECIAL = {
    discharge.run_state_p: cores.interpret_run_state,
    primitives.wgmma_accumulator_store_p: cores.interpret_store,
    primitives.wgmma_wait_p: cores.interpret_wait,
}
_upstream_interpret = Interpreter.interpret


def _split(eqns):
    """Split equations into runs of ordinary ones and single special ones."""
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
    """Interpret ordinary equations as JAX does, and special ones by `_SPECIAL`."""
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


def _run_jaxpr(jaxpr, consts, *args):
    """Evaluate a thread's program, which JAX compiles again in each thread."""
    with deadlocks.counted():
        evaluate(jaxpr, consts, [np.asarray(x) for x in args])


def _io_callback(*args, result_avals, callback, sharding, ordered):
    """Call back with NumPy arrays.

    JAX would first copy each argument to a device, and most are one number.
    """
    return [np.asarray(x) for x in callback(*map(as_given, args))]


def _replacements():
    """Yield (object, name, replacement) for each function of JAX that is replaced."""
    yield Interpreter, "interpret", _interpret
    yield Interpreter, "_interpret_wgmma_ref_p", cores.interpret_wgmma
    yield Interpreter, "_interpret_wgmma_accumulator_deref_p", cores.interpret_deref
    yield Interpreter, "_interpret_inline_mgpu_p", cores.interpret_inline
    yield Interpreter, "_interpret_copy_smem_to_gmem_p", copies.interpret_store
    yield Interpreter, "_interpret_copy_gmem_to_smem_p", copies.interpret_load
    yield memory.Barrier, "__init__", deadlocks.barrier_init
    yield memory.Barrier, "wait", deadlocks.barrier_wait
    yield thread_map, "_thread_map_callback", deadlocks.thread_map_callback
    yield thread_map, "_run_jaxpr", _run_jaxpr
    yield callback, "io_callback_impl", _io_callback


@contextlib.contextmanager
def _replaced():
    found = []
    try:
        for owner, name, ours in _replacements():
            if not hasattr(owner, name):
                where = getattr(owner, "__name__", owner)
                raise RuntimeError(f"jax {jax.__version__} has no {where}.{name}")
            found.append((owner, name, getattr(owner, name)))
            setattr(owner, name, ours)
        yield
    finally:
        for owner, name, theirs in reversed(found):
            setattr(owner, name, theirs)


@contextlib.contextmanager
def _quiet():
    """Silence JAX's log, which would repeat each failure of a kernel five times."""
    logger = logging.getLogger("jax._src.callback")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shortened(error: Exception) -> Exception:
    """Return an error with the one message that matters.

    JAX's message nests the tracebacks of several callbacks.
    """
    text = str(error)
    if "RACE DETECTED" in text:
        return RaceError(text[text.rindex("RACE DETECTED") :].split("\n\n")[0])
    if deadlock := re.search(r"DEADLOCK: .*", text):
        return DeadlockError(deadlock.group(0))
    lines = [
        line
        for line in text.splitlines()
        if re.match(r"\w*(Error|Exception)\b", line)
        and "Computation failed" not in line
        and "CpuCallback" not in line
    ]
    return RuntimeError(f"interpreted kernel failed: {lines[-1]}") if lines else error


@contextlib.contextmanager
def interpret(meanings: Meanings):
    """Emulate every `plgpu.kernel` that is traced inside, with races as errors."""
    pairs = tuple((MEANINGS | dict(meanings)).items())
    parameters = Parameters(
        detect_races=True, num_tma_threads_per_device=COPIES, meanings=pairs
    )
    cores.pending.clear()
    try:
        with (
            _replaced(),
            _quiet(),
            plgpu.force_gpu_interpret_mode(parameters),
        ):
            yield
        # jax 0.11 prints races and goes on; 0.12 raises.
        races = cb._races
        if races is not None and races.races_found:
            raise RaceError("RACE DETECTED, see stdout")
    except (RaceError, DeadlockError):
        raise
    except RuntimeError as error:
        short = _shortened(error)
        if short is error:
            raise
        raise short from None
    finally:
        forget()
        cb.reset_gpu_interpret_mode_state()
