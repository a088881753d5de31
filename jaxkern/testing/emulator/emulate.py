"""Run Mosaic GPU kernels on a CPU and find their races."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def emulate_gpu(
    *,
    meanings: Mapping[Any, Callable[..., Any]] | None = None,
) -> Iterator[None]:
    r"""Run every `plgpu.kernel` that is traced inside on the CPU, and find its faults.

    Memory spaces, TMA copies, barriers and wgmma are emulated. Threads run at the same
    time, and every access of memory gets a vector clock $C$. Two accesses $a$ and $b$
    race if one of them writes and the clocks order them neither way:

    $$\neg (C_a < C_b) \wedge \neg (C_b < C_a)$$

    So this finds wrong results, a slot that is released or refilled too early, a
    missing `commit_smem`, wgmmas that are not awaited, barriers at which nobody
    arrives, reads of memory that nobody wrote (they give NaN), and bulk copies past the
    end of a row. It does not find what only a compiler refuses, such as illegal layouts
    or spilled registers: `compile_for` does. An access of memory takes about a
    millisecond, so test with few steps.

    Wait for results inside of the context (`jax.block_until_ready`), and call a fresh
    `jax.jit` there, since JAX caches what it has traced, emulated kernels too.

    Args:
        meanings: What your functions for `plgpu.inline_mgpu` compute. Keys are these
            functions or, where the decorator hides them, their names. Values are
            functions in jnp that take the same arguments without `ctx`, with arrays in
            place of references. They also get the options that a kernel binds to an
            inline function by `functools.partial`.

    Returns:
        A context manager.

    Raises:
        RaceError: Two accesses race.
        DeadlockError: Every thread that has not ended waits at a barrier.
        NotImplementedError: A function for `plgpu.inline_mgpu` has no meaning.
        RuntimeError: A kernel fails in another way, which the message names.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        from jax.experimental.pallas import mosaic_gpu as plgpu
        from jaxkern import testing


        def double(x):
            def kernel(x_gmem, y_gmem, smem, arrived):
                plgpu.copy_gmem_to_smem(x_gmem, smem, arrived)
                plgpu.barrier_wait(arrived)
                smem[...] = 2 * smem[...]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem, y_gmem)
                plgpu.wait_smem_to_gmem(0)

            return plgpu.kernel(
                kernel,
                out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
                scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
            )(x)


        x = jnp.arange(128.0)
        with testing.emulate_gpu():
            y = jax.block_until_ready(double(x))
        assert (y == 2 * x).all()
        ```
    """
    # Mosaic is imported when a kernel is first used.
    from .interpreter import interpret

    with interpret(meanings or {}):
        yield
