"""Refuse bulk copies that reach past the end of a row.

Between a contiguous part of GMEM and SMEM without a swizzle, Mosaic GPU makes a bulk
copy (`is_simple_contiguous_copy` in jax/experimental/mosaic/gpu/launch_context.py). A
tensor copy stops at the end of each axis. A bulk copy only stops at the end of the
whole array, so what reaches past the end of a row lands in the next one. Loads that
fill with zeros, which is their default, are tensor copies.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax.experimental.mosaic.gpu.launch_context import OOBFillMode

cb: Any = gpu_callbacks
Interpreter: Any = jaxpr_interpret.JaxprInterpreter
# The bytes of which PTX wants addresses and sizes of cp.async.bulk to be multiples.
BULK_BYTES = 16


def check_bulk_copy(shape, itemsize, ranges, is_cut=True):
    """Check that a bulk copy touches only the part of the array that is asked for.

    Args:
        ranges: the part, as a slice or an index for each axis.
        is_cut: whether the copy stops at the end of the array.

    Raises:
        IndexError: the copy reaches past the end of a row, or does not start and end at
            a multiple of `BULK_BYTES`.
    """
    sizes = [1 if isinstance(r, int) else r.stop - r.start for r in ranges]
    starts = [r if isinstance(r, int) else r.start for r in ranges]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    contiguous = 1
    for size, stride in zip(sizes[::-1], strides[::-1], strict=True):
        if size != 1 and stride != contiguous:
            return
        contiguous *= size
    first = sum(i * stride for i, stride in zip(starts, strides, strict=True))
    end = first + math.prod(sizes)
    if is_cut:
        end = max(first, min(end, math.prod(shape)))
    axes = zip(starts, sizes, shape, strict=True)
    inside = math.prod(max(0, min(i + n, size) - i) for i, n, size in axes)
    part = ", ".join(
        f"{i}:{i + n}" if isinstance(r, slice) else str(i)
        for i, n, r in zip(starts, sizes, ranges, strict=True)
    )
    what = f"copy of [{part}] of an array of shape {tuple(shape)}"
    if end - first > inside:
        raise IndexError(
            f"{what} reaches past the end of a row: a bulk copy does not stop there"
        )
    if end > first and (first * itemsize % BULK_BYTES or end * itemsize % BULK_BYTES):
        raise IndexError(
            f"{what} must start and end at multiples of {BULK_BYTES} bytes, as a bulk "
            f"copy, got {first * itemsize} and {end * itemsize}"
        )


@cb.fail_on_exception
def _check(*, token, thread, key, transforms, is_cut):
    shared = cb._get_shared_memory()
    key = cb.HostAllocationKey.from_array(key)
    indices = jax.tree.map(int, cb._remove_noop_transforms(transforms))
    buffer = shared.buffer_shape_and_dtype(key)
    ranges = shared.access(key, indices).range
    check_bulk_copy(buffer.shape, np.dtype(buffer.dtype).itemsize, ranges, is_cut)
    return token


def _call_check(self, eqn, token, invals, gmem, is_cut):
    """Check a copy if it is a bulk copy.

    Args:
        gmem: which of the copy's two references is in GMEM, 0 or 1.
    """
    count = 2 + eqn.params.get("has_barrier", False)
    names = "src_transforms_treedef", "dst_transforms_treedef"
    trees = [eqn.params[name] for name in names]
    leaves = invals[count : count + sum(tree.num_leaves for tree in trees)]
    both = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    if any(isinstance(t, memory.LAYOUT_TRANSFORMS) for t in both[1 - gmem]):
        return token
    key, transforms = jaxpr_interpret.resolve_ref(
        eqn.invars[gmem].aval, invals[gmem], both[gmem]
    )
    return callback.io_callback(
        functools.partial(_check, is_cut=is_cut),
        cb.TOKEN_SHAPE_DTYPE,
        token=token,
        thread=self.thread,
        key=key,
        transforms=transforms,
    )


_upstream_store = Interpreter._interpret_copy_smem_to_gmem_p
_upstream_load = Interpreter._interpret_copy_gmem_to_smem_p


def interpret_store(self, eqn, token, *invals, **params):
    token = _call_check(self, eqn, token, invals, gmem=1, is_cut=True)
    return _upstream_store(self, eqn, token, *invals, **params)


def interpret_load(self, eqn, token, get_invals):
    mode, collective = eqn.params["oob_mode"], eqn.params["collective_axes"]
    invals = get_invals()
    if mode not in (None, OOBFillMode.ZEROS) and not collective:
        is_cut = mode != OOBFillMode.PROMISE_IN_BOUNDS
        token = _call_check(self, eqn, token, invals, gmem=0, is_cut=is_cut)
    return _upstream_load(self, eqn, token, lambda: invals)
