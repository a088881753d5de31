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

    Memory spaces, TMA copies, barriers and wgmma are emulated, threads run at once, and
    each access of memory has a vector clock. Two accesses $a$ and $b$ race if one of
    them writes and the clocks order them neither way:

    $$\neg (C_a < C_b) \wedge \neg (C_b < C_a)$$

    So it finds wrong results, a slot that is released or refilled too early, a missing
    `commit_smem`, wgmmas that are not awaited, barriers that nobody arrives at, reads
    of memory that nobody wrote (they are NaN) and bulk copies past the end of a row. It
    does not find what only a compiler refuses, such as illegal layouts or spilled
    registers: ask `compile_for` for these. It is slow, about a millisecond for each
    access of memory: test with few steps.

    Wait for results inside (`jax.block_until_ready`), and call a fresh `jax.jit` there:
    JAX keeps what it has traced, also that of an emulated kernel.

    Args:
        meanings: A function in jnp for each of your functions for `plgpu.inline_mgpu`,
            of the same arrays but `ctx`; by the function itself or by its name, as the
            decorator hides it. References come as arrays. Options that are bound by
            `functools.partial` are passed on.

    Raises:
        RaceError: Two accesses race.
        DeadlockError: Each thread that has not ended waits at a barrier.
        NotImplementedError: A function for `plgpu.inline_mgpu` has no meaning.
        RuntimeError: A kernel fails in another way, in a sentence that says how.

    A kernel that doubles an array, and the same without the fence between its writes
    and the copy that reads them:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax.experimental.pallas import mosaic_gpu as plgpu
    >>> from jaxkern import testing
    >>> def double(x, fence=plgpu.commit_smem):
    ...     def kernel(x_gmem, y_gmem, smem, arrived):
    ...         plgpu.copy_gmem_to_smem(x_gmem, smem, arrived)
    ...         plgpu.barrier_wait(arrived)
    ...         smem[...] = 2 * smem[...]
    ...         fence()
    ...         plgpu.copy_smem_to_gmem(smem, y_gmem)
    ...         plgpu.wait_smem_to_gmem(0)
    ...
    ...     return plgpu.kernel(
    ...         kernel,
    ...         out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    ...         scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
    ...     )(x)
    >>> with testing.emulate_gpu():
    ...     print(double(jnp.arange(128.0))[:4])
    [0. 2. 4. 6.]
    >>> with testing.emulate_gpu():
    ...     print(double(jnp.arange(128.0), fence=lambda: None)[:4])
    Traceback (most recent call last):
        ...
    jaxkern.testing.RaceError: RACE DETECTED
    ...
    """
    # Mosaic is imported on first use of a kernel.
    from .interpreter import interpret

    with interpret(meanings or {}):
        yield
