"""The kernels' test bench must find what it is there to find."""

import jax
import jax.numpy as jnp
import mgpu_interpret
import numpy as np
import pytest
from helpers import normal, relative_error
from jax.experimental import pallas as pl

from jaxkern._mgpu import add_dots, dots, plgpu, slot, swizzle_of, tiles, zeros

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
            def _(i):
                s, part = slot(i, STEPS), pl.ds(i * DEPTH, DEPTH)

                @pl.when(i >= STEPS)
                def _():
                    plgpu.barrier_wait(consumed.at[s])

                ready = produced.at[s]
                plgpu.copy_gmem_to_smem(a_gmem.at[:, part], a_smem.at[s], ready)
                plgpu.copy_gmem_to_smem(b_gmem.at[part], b_smem.at[s], ready)

            @pl.loop(COUNT - STEPS, COUNT)
            def _(i):
                plgpu.barrier_wait(consumed.at[slot(i, STEPS)])

    def smem(*shape):
        return plgpu.SMEM(shape, a.dtype, transforms=tiles(a.dtype, 128))

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
        ("released before it is read", mgpu_interpret.RaceError, "RACE DETECTED"),
        ("stored before it is written", mgpu_interpret.RaceError, "RACE DETECTED"),
        ("never released", RuntimeError, r"DEADLOCK\? .* barrier_wait at .*test_mgpu"),
    ],
)
def test_a_wrong_kernel_is_found(mistake, error, message, monkeypatch):
    monkeypatch.setattr(mgpu_interpret, "DEADLOCK_SECONDS", 3.0)
    with pytest.raises(error, match=message), mgpu_interpret.interpret():
        jax.block_until_ready(matmul(A, B, mistake))


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
            plgpu.SMEM((ROWS, ROWS), A.dtype, transforms=tiles(A.dtype, 128)),
            plgpu.Barrier(),
        ],
    )(square)
    exact = np.asarray(square, np.float64) @ np.asarray(square, np.float64)
    assert relative_error(y, exact) < 1e-5


@pytest.mark.parametrize(
    "features, swizzle", [(16, 32), (32, 64), (64, 128), (96, 64), (80, 32), (8, 0)]
)
def test_swizzle(features, swizzle):
    assert swizzle_of(features, 2) == swizzle
