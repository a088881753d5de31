"""The errors that only an emulated kernel raises."""


class RaceError(AssertionError):
    """Two accesses of the same memory race: one writes, and nothing orders them.

    `emulate_gpu` raises it. The message names both accesses and their lines, which
    jax 0.11 prints instead.

    Examples:
        A copy from shared memory, without the `plgpu.commit_smem()` that makes the
        writes before it visible:

        ```python
        import jax
        import jax.numpy as jnp
        import pytest
        from jax.experimental.pallas import mosaic_gpu as plgpu
        from jaxkern import testing


        def kernel(y_gmem, smem):
            smem[...] = jnp.zeros(128, jnp.float32)
            plgpu.copy_smem_to_gmem(smem, y_gmem)
            plgpu.wait_smem_to_gmem(0)


        zeros = plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
            scratch_types=[plgpu.SMEM((128,), jnp.float32)],
        )
        with pytest.raises(testing.RaceError), testing.emulate_gpu():
            jax.block_until_ready(zeros())
        ```
    """


class DeadlockError(RuntimeError):
    """Every thread of a kernel that has not ended waits at a barrier.

    `emulate_gpu` raises it. The message names a barrier, the line that waits and the
    thread.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        import pytest
        from jax.experimental.pallas import mosaic_gpu as plgpu
        from jaxkern import testing


        def kernel(y_gmem, arrived):
            plgpu.barrier_wait(arrived)
            y_gmem[...] = jnp.zeros(128, jnp.float32)


        zeros = plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
            scratch_types=[plgpu.Barrier()],
        )
        with pytest.raises(testing.DeadlockError), testing.emulate_gpu():
            jax.block_until_ready(zeros())
        ```
    """


# Tracebacks name the errors as users import them.
for _error in (RaceError, DeadlockError):
    _error.__module__ = "jaxkern.testing"
