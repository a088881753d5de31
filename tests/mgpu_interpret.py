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

import collections
import contextlib
import functools
import logging
import re
import threading
import types
from typing import Any
from unittest import mock

import jax
import mgpu_copies
import numpy as np
from jax._src import callback, source_info_util
from jax._src import core as jax_core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import discharge
from jax._src.state import types as state_types
from jax.experimental.pallas import mosaic_gpu as plgpu

cb: Any = gpu_callbacks
Interpreter: Any = jaxpr_interpret.JaxprInterpreter
TOKEN = cb.TOKEN_SHAPE_DTYPE
DEADLOCK_SECONDS = 20.0

# By thread, the clocks of the wgmmas in flight.
_pending = collections.defaultdict(collections.deque)


class RaceError(AssertionError):
    """Two accesses of shared memory that nothing orders."""


def _await_wgmma(shared, thread, n):
    """Let all but the last `n` wgmmas of the thread be done."""
    if not shared.detect_races:
        return
    with shared.lock:
        shared.incr_clock(thread, take_lock=False)
        while len(_pending[thread]) > n:
            shared.clocks[thread].update(_pending[thread].popleft())


def _read(shared, operand, thread, log):
    key, transforms = operand
    key = cb.HostAllocationKey.from_array(key)
    indices = jax.tree.map(int, cb._remove_noop_transforms(transforms))
    access = shared.access(key, indices)
    value, _, _ = shared.get_buffer_content(key, access, thread, logging_info=log)
    if value is None or value.shape != access.shape:
        raise IndexError(f"wgmma operand out of bounds: {access}")
    return key, access, value


@cb.fail_on_exception
def _wgmma(
    *, token, mesh_location, thread, acc, a, b, a_is_ref, source_info=None
):  # acc, a, b: (allocation key or value, transforms)
    shared = cb._get_shared_memory()
    log = memory.GPULoggingInfo(mesh_location, thread, source_info)
    in_smem = [_read(shared, b, thread, log)]
    if a_is_ref:
        in_smem.append(_read(shared, a, thread, log))
    left, right = in_smem[-1][2] if a_is_ref else np.asarray(a[0]), in_smem[0][2]
    key, access, value = _read(shared, acc, thread, log)
    if shared.detect_races:
        clock = shared.get_clock(thread)
        clock.inc(shared.get_next_tma_thread_id())
        for smem_key, smem_access, _ in in_smem:
            cb.get_races().check_read(
                thread, clock.async_smem_clock, smem_key, smem_access, source_info
            )
        _pending[thread].append(clock)
    # Infinities are the kernel's business, not NumPy's.
    with np.errstate(all="ignore"):
        product = np.matmul(left.astype(value.dtype), right.astype(value.dtype))
    shared.store_buffer_content(key, access, value + product, thread, logging_info=log)
    return token


@cb.fail_on_exception
def _wait(*, token, thread, n):
    _await_wgmma(cb._get_shared_memory(), thread, n)
    return token


@cb.fail_on_exception
def _store_accumulator(*, token, mesh_location, thread, key, value, source_info=None):
    shared = cb._get_shared_memory()
    key = cb.HostAllocationKey.from_array(key)
    log = memory.GPULoggingInfo(mesh_location, thread, source_info)
    access = shared.access(key, ())
    shared.store_buffer_content(key, access, np.array(value), thread, logging_info=log)
    return token


def _interpret_wgmma(self, eqn, token, get_invals):
    acc, a, b, *leaves = get_invals()
    names = ("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree")
    empty = jax.tree.structure([])
    trees = tuple(eqn.params[name] or empty for name in names)
    transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    refs = [acc, a, b]
    is_ref = [isinstance(v.aval, state_types.AbstractRef) for v in eqn.invars[:3]]
    operands = [
        jaxpr_interpret.resolve_ref(v.aval, x, t) if ref else (x, t)
        for v, x, t, ref in zip(eqn.invars[:3], refs, transforms, is_ref, strict=True)
    ]
    run = functools.partial(_wgmma, a_is_ref=is_ref[1], source_info=eqn.source_info)
    token = callback.io_callback(
        run,
        TOKEN,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc=operands[0],
        a=operands[1],
        b=operands[2],
    )
    return token, []


def _call_wait(self, token, n):
    run = functools.partial(_wait, n=n)
    return callback.io_callback(run, TOKEN, token=token, thread=self.thread)


def _interpret_wait(self, eqn, token, invals):
    return _call_wait(self, token, eqn.params["n"]), []


_upstream_deref = Interpreter._interpret_wgmma_accumulator_deref_p


def _interpret_deref(self, eqn, token, get_invals):
    if eqn.params["wait_n"] is not None:
        token = _call_wait(self, token, eqn.params["wait_n"])
    return _upstream_deref(self, eqn, token, get_invals)


def _interpret_run_state(self, eqn, token, invals):
    jaxpr = eqn.params["jaxpr"]
    if not all(eqn.params["is_initialized"]):
        raise NotImplementedError("run_state with uninitialized refs")
    keys, ours = [], []
    for var, outer, x in zip(jaxpr.invars, eqn.invars, invals, strict=True):
        is_ref = isinstance(var.aval, state_types.AbstractRef)
        # SMEM and barriers closed over are allocated already.
        if is_ref and not isinstance(outer.aval, state_types.AbstractRef):
            token, request = cb.call_make_allocation_request_array(
                token=token,
                compute_unit=self.thread,
                initial_ref_count=1,
                memory_space_id=memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
            )
            token, x = cb.call_allocate_buffer(
                token=token,
                mesh_location=self.mesh_location,
                thread=self.thread,
                allocation_request_as_array=request,
                value=x,
                source_info=eqn.source_info,
            )
            ours.append(len(keys))
        keys.append(x)
    token, _ = self.interpret(jaxpr, token, *keys)
    token = _call_wait(self, token, 0)
    outs = list(keys)
    for i in ours:
        inner: Any = jaxpr.invars[i].aval
        shape = jax.ShapeDtypeStruct(inner.inner_aval.shape, inner.inner_aval.dtype)
        read = functools.partial(
            cb.wgmma_accumulator_deref, source_info=eqn.source_info, wait_n=None
        )
        token, outs[i] = callback.io_callback(
            read,
            (TOKEN, shape),
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            acc_allocation_key_as_array=keys[i],
        )
        token = cb.call_deallocate_buffer(
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_key_as_array=keys[i],
            source_info=eqn.source_info,
        )
    return token, outs


@cb.fail_on_exception
def _read_for_inline(
    *, token, mesh_location, thread, refs, is_operand, source_info=None
):
    """Operands as a wgmma that is awaited at once reads them, others as loads do."""
    shared = cb._get_shared_memory()
    log = memory.GPULoggingInfo(mesh_location, thread, source_info)
    found = [_read(shared, ref, thread, log) for ref in refs]
    if shared.detect_races:
        clock = shared.get_clock(thread)
        generic = clock.generic_clock.copy()
        clock.inc(shared.get_next_tma_thread_id())
        for (key, access, _), operand in zip(found, is_operand, strict=True):
            by = clock.async_smem_clock if operand else generic
            cb.get_races().check_read(thread, by, key, access, source_info)
        _pending[thread].append(clock)
        _await_wgmma(shared, thread, 0)
    return token, [np.asarray(value) for _, _, value in found]


def _interpret_inline(self, eqn, token, get_invals):
    params, invals = eqn.params, list(get_invals())
    count = params["pytree_args"].num_leaves
    transforms = jax.tree.unflatten(params["pytree_ref_transforms"], invals[count:])
    values, refs, shapes, is_operand = invals[:count], {}, [], []
    for i, variable in enumerate(eqn.invars[:count]):
        if isinstance(variable.aval, state_types.AbstractRef):
            key, steps = jaxpr_interpret.resolve_ref(
                variable.aval, values[i], tuple(transforms[i])
            )
            aval: Any = state_types.transform_type(steps, variable.aval)
            refs[i] = key, steps
            # What is tiled is there for the tensor cores.
            is_operand.append(bool(params["flat_arg_types"][i].transforms))
            shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    if refs:
        read = functools.partial(
            _read_for_inline, is_operand=is_operand, source_info=eqn.source_info
        )
        token, found = callback.io_callback(
            read,
            (TOKEN, shapes),
            token=token,
            mesh_location=self.mesh_location,
            thread=self.thread,
            refs=list(refs.values()),
        )
        for i, value in zip(refs, found, strict=True):
            values[i] = value
    meaning = params["mgpu_fn"].emulated
    results = meaning(*jax.tree.unflatten(params["pytree_args"], values))
    return token, jax.tree.leaves(results)


def _interpret_store(self, eqn, token, invals):
    key, value = invals
    run = functools.partial(_store_accumulator, source_info=eqn.source_info)
    token = callback.io_callback(
        run,
        TOKEN,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        key=key,
        value=value,
    )
    return token, [value]


_SPECIAL = {
    discharge.run_state_p: _interpret_run_state,
    primitives.wgmma_accumulator_store_p: _interpret_store,
    primitives.wgmma_wait_p: _interpret_wait,
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
        "_interpret_wgmma_ref_p": _interpret_wgmma,
        "_interpret_wgmma_accumulator_deref_p": _interpret_deref,
        "_interpret_inline_mgpu_p": _interpret_inline,
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
    _pending.clear()
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
