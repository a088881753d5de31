"""The emulator finds races, deadlocks and wrong copies, and passes right kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, relative_error
from jax.experimental import pallas as pl

from jaxkern._mosaic.base import (
    add_dots,
    dots,
    plgpu,
    slot,
    swizzle_of,
    tiled_layout,
    zeros,
)
from jaxkern.testing import DeadlockError, RaceError, emulate_gpu
from jaxkern.testing.emulator import deadlocks
from jaxkern.testing.emulator.copies import check_bulk_copy

ROWS, DEPTH, COLUMNS, COUNT, STEPS = 64, 64, 64, 4, 2


def matmul(a, b, mistake=None):
    """a @ b in steps over the contraction: one warpgroup computes, one loads."""

    def kernel(a_gmem, b_gmem, y_gmem, a_smem, b_smem, y_smem, produced, consumed):
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def compute():
            def body(i, y):
                s = slot(i, STEPS)
                plgpu.barrier_wait(produced.at[s])
                if mistake == "released before it is read":

                    def early(acc):
                        plgpu.wgmma(acc, a_smem.at[s], b_smem.at[s])
                        plgpu.barrier_arrive(consumed.at[s])

                    return pl.run_state(early)(plgpu.ACC.init(y))
                y = add_dots(y, (a_smem.at[s], b_smem.at[s]))
                if mistake != "never released":
                    plgpu.barrier_arrive(consumed.at[s])
                return y

            y = jax.lax.fori_loop(0, COUNT, body, zeros(ROWS, COLUMNS))
            y_smem[...] = y.astype(y_smem.dtype)
            if mistake != "stored before it is written":
                plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_smem, y_gmem)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def load():
            @pl.loop(0, COUNT)
            def load_step(i):
                s, part = slot(i, STEPS), pl.ds(i * DEPTH, DEPTH)

                @pl.when(i >= STEPS)
                def wait_until_empty():
                    plgpu.barrier_wait(consumed.at[s])

                ready = produced.at[s]
                plgpu.copy_gmem_to_smem(a_gmem.at[:, part], a_smem.at[s], ready)
                plgpu.copy_gmem_to_smem(b_gmem.at[part], b_smem.at[s], ready)

            @pl.loop(COUNT - STEPS, COUNT)
            def drain(i):
                plgpu.barrier_wait(consumed.at[slot(i, STEPS)])

    def smem(*shape):
        return plgpu.SMEM(shape, a.dtype, transforms=tiled_layout(a.dtype, 128))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((ROWS, COLUMNS), a.dtype),
        scratch_types=[
            smem(STEPS, ROWS, DEPTH),
            smem(STEPS, DEPTH, COLUMNS),
            smem(ROWS, COLUMNS),
            plgpu.Barrier(num_arrivals=2, num_barriers=STEPS),
            plgpu.Barrier(num_barriers=STEPS),
        ],
        grid=(1,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
    )(a, b)


A = normal(0, (ROWS, COUNT * DEPTH), jnp.bfloat16)
B = normal(1, (COUNT * DEPTH, COLUMNS), jnp.bfloat16)


def test_a_right_kernel_passes(interpreted):
    exact = np.asarray(A, np.float64) @ np.asarray(B, np.float64)
    assert relative_error(matmul(A, B), exact) < 0.01


@pytest.mark.parametrize(
    "mistake, error, message",
    [
        ("released before it is read", RaceError, "RACE DETECTED"),
        ("stored before it is written", RaceError, "RACE DETECTED"),
        ("never released", DeadlockError, r"DEADLOCK: .* barrier_wait of .*test_emul"),
    ],
)
def test_a_wrong_kernel_is_found(mistake, error, message):
    with pytest.raises(error, match=message), emulate_gpu():
        jax.block_until_ready(matmul(A, B, mistake))


def test_threads_that_take_long_are_no_deadlock(interpreted, monkeypatch):
    """Threads that wait look for a deadlock often here, and must not find one."""
    monkeypatch.setattr(deadlocks, "LOOK_SECONDS", 1e-4)
    jax.block_until_ready(matmul(A, B))


def test_dot_with_registers_on_the_left(interpreted):
    def kernel(a_gmem, y_gmem, a_smem, ready):
        plgpu.copy_gmem_to_smem(a_gmem, a_smem, ready)
        plgpu.barrier_wait(ready)
        (y_gmem[...],) = dots((a_smem[...], a_smem))

    square = A[:, :ROWS]
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((ROWS, ROWS), jnp.float32),
        scratch_types=[
            plgpu.SMEM((ROWS, ROWS), A.dtype, transforms=tiled_layout(A.dtype, 128)),
            plgpu.Barrier(),
        ],
    )(square)
    exact = np.asarray(square, np.float64) @ np.asarray(square, np.float64)
    assert relative_error(y, exact) < 1e-5


def copy_part(shape, first, mode=None):
    """Copy 64 numbers to [0, first:] of an array or, if there is a mode, from there."""

    def kernel(x_gmem, y_gmem, smem, ready):
        # The offset is traced, because JAX refuses one that it knows is out of bounds.
        part = pl.ds(first + jax.lax.axis_index("block"), 64)
        if mode is None:
            smem[...] = jnp.ones(smem.shape, smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, y_gmem.at[0, part])
            plgpu.wait_smem_to_gmem(0)
        else:
            plgpu.copy_gmem_to_smem(x_gmem.at[0, part], smem, ready, oob_mode=mode)
            plgpu.barrier_wait(ready)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch_types=[plgpu.SMEM((64,), jnp.float32), plgpu.Barrier()],
        grid=(1,),
        grid_names=("block",),
    )(jnp.ones(shape, jnp.float32))


MODES = plgpu.OOBFillMode


@pytest.mark.parametrize(
    "shape, first, mode",
    [
        ((2, 128), 64, None),
        # Cut at the end of the array.
        ((1, 100), 64, None),
        ((2, 100), 64, MODES.ZEROS),
        ((1, 100), 64, MODES.UNDEFINED),
        ((2, 128), 64, MODES.PROMISE_IN_BOUNDS),
    ],
)
def test_copies_that_stop_where_they_should(shape, first, mode, interpreted):
    y = np.asarray(copy_part(shape, first, mode))
    if mode is None:
        assert (y[0, first : first + 64] == 1).all()


@pytest.mark.parametrize(
    "shape, first, mode, message",
    [
        ((2, 100), 64, None, "past the end of a row"),
        ((2, 100), 64, MODES.UNDEFINED, "past the end of a row"),
        ((1, 100), 64, MODES.PROMISE_IN_BOUNDS, "past the end of a row"),
        ((2, 128), 2, None, "multiples of 16 bytes, .* got 8 and 264"),
        ((1, 97), 64, None, "multiples of 16 bytes, .* got 256 and 388"),
    ],
)
def test_copies_that_do_not(shape, first, mode, message):
    part = rf"copy of \[0, {first}:{first + 64}\] of an array of shape "
    part += re.escape(str(shape))
    with (
        pytest.raises(RuntimeError, match=f"{part}.* {message}"),
        emulate_gpu(),
    ):
        jax.block_until_ready(copy_part(shape, first, mode))


@pytest.mark.parametrize(
    "shape, part",
    [
        # Not contiguous, so a tensor copy.
        ((4, 96), np.s_[0:2, 64:128]),
        ((4, 3, 64), np.s_[0:2, 1, 0:64]),
        # The last rows of the array.
        ((4, 64), np.s_[2:6, 0:64]),
        ((2, 3, 64), np.s_[1, 2:4, 0:64]),
        # No part of the array.
        ((2, 3, 64), np.s_[1, 3, 0:64]),
    ],
)
def test_parts_that_bulk_copies_respect(shape, part):
    check_bulk_copy(shape, 2, part)


@pytest.mark.parametrize(
    "shape, part",
    [
        ((4, 64), np.s_[0:2, 8:72]),
        ((2, 3, 64), np.s_[0, 2:4, 0:64]),
        ((2, 3, 64), np.s_[0, 3, 0:64]),
        ((2, 1, 1, 64), np.s_[0, 0, 0, 32:96]),
    ],
)
def test_parts_that_bulk_copies_leave(shape, part):
    with pytest.raises(IndexError, match="past the end of a row"):
        check_bulk_copy(shape, 2, part)


@pytest.mark.parametrize(
    "features, swizzle", [(16, 32), (32, 64), (64, 128), (96, 64), (80, 32), (8, 0)]
)
def test_swizzle(features, swizzle):
    assert swizzle_of(features, 2) == swizzle
