"""Emulate tensor cores: wgmma, accumulators and inline functions.

The reads of shared memory by a wgmma stay pending until the wgmma is awaited. Until
then, a thread that releases a slot does not order them before the next write to it.
"""

import collections
import functools
from typing import Any

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import types as state_types

cb: Any = gpu_callbacks
Interpreter: Any = jaxpr_interpret.JaxprInterpreter
TOKEN = cb.TOKEN_SHAPE_DTYPE

# The clocks of each thread's wgmmas in flight, oldest first.
pending = collections.defaultdict(collections.deque)


def _await_wgmma(shared, thread, n):
    """Await all but the last `n` wgmmas of the thread."""
    if not shared.detect_races:
        return
    with shared.lock:
        shared.incr_clock(thread, take_lock=False)
        while len(pending[thread]) > n:
            shared.clocks[thread].update(pending[thread].popleft())


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
        pending[thread].append(clock)
    # A kernel may compute infinities, without a warning.
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


def interpret_wgmma(self, eqn, token, get_invals):
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


def interpret_wait(self, eqn, token, invals):
    return _call_wait(self, token, eqn.params["n"]), []


_upstream_deref = Interpreter._interpret_wgmma_accumulator_deref_p


def interpret_deref(self, eqn, token, get_invals):
    if eqn.params["wait_n"] is not None:
        token = _call_wait(self, token, eqn.params["wait_n"])
    return _upstream_deref(self, eqn, token, get_invals)


def interpret_run_state(self, eqn, token, invals):
    jaxpr = eqn.params["jaxpr"]
    if not all(eqn.params["is_initialized"]):
        raise NotImplementedError("run_state with uninitialized refs")
    keys, ours = [], []
    for var, outer, x in zip(jaxpr.invars, eqn.invars, invals, strict=True):
        is_ref = isinstance(var.aval, state_types.AbstractRef)
        # References that the body closes over, to SMEM and barriers, exist already.
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
    """Read the references of an inline function.

    Operands of the tensor cores are read as a wgmma reads them that is awaited at once,
    others as loads of a thread.
    """
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
        pending[thread].append(clock)
        _await_wgmma(shared, thread, 0)
    return token, [np.asarray(value) for _, _, value in found]


def _meaning(meanings, fn):
    """Return the meaning of an inline function, with the options bound to it.

    Raises:
        NotImplementedError: The function has no meaning.
    """
    options = {}
    while isinstance(fn, functools.partial):
        if fn.args:
            raise NotImplementedError(
                f"emulate_gpu: an inline function's options must be bound by keyword, "
                f"got functools.partial of {fn.func.__qualname__} and {fn.args}"
            )
        fn, options = fn.func, fn.keywords | options
    known = dict(meanings)
    meaning = known.get(fn, known.get(fn.__name__))
    if meaning is None:
        code = fn.__code__
        raise NotImplementedError(
            f"emulate_gpu: inline function {fn.__qualname__} must have a meaning, a "
            f"function of the same arrays in jnp, got none; give one as emulate_gpu("
            f"meanings={{{fn.__name__!r}: ...}}). It is defined at "
            f"{code.co_filename}:{code.co_firstlineno}"
        )
    return functools.partial(meaning, **options)


def interpret_inline(self, eqn, token, get_invals):
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
            # A reference with a tiled layout is an operand of the tensor cores.
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
    meaning = _meaning(self.interpret_params.meanings, params["mgpu_fn"])
    results = meaning(*jax.tree.unflatten(params["pytree_args"], values))
    return token, jax.tree.leaves(results)


def interpret_store(self, eqn, token, invals):
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
