"""Meanings that users give the emulator for their `plgpu.inline_mgpu` functions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern._mosaic.base import plgpu
from jaxkern.testing import RaceError, emulate_gpu

X = jnp.arange(128.0)
LAYOUT = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
RETURNS = plgpu.ShapeDtypeStruct((128,), jnp.float32, layout=LAYOUT)
of_values = plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=RETURNS)
of_memory = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=RETURNS)


@of_values
def double(ctx, x):
    return x + x


def times(ctx, x, *, factor):
    return x * factor


@of_memory
def doubled(ctx, smem):
    raise NotImplementedError("instructions")


def apply(inline, x, is_waited=True):
    """Run a kernel that copies `x` to shared memory and applies an inline function."""

    def kernel(x_gmem, y_gmem, smem, arrived):
        plgpu.copy_gmem_to_smem(x_gmem, smem, arrived)
        if is_waited:
            plgpu.barrier_wait(arrived)
        y_gmem[...] = inline(smem)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
    )(x)


def test_a_meaning_by_name():
    with emulate_gpu(meanings={"double": lambda x: 2 * x}):
        y = apply(lambda smem: double(smem[...]), X)
    np.testing.assert_array_equal(y, 2 * X)


def test_a_meaning_by_function_with_bound_options():
    triple = of_values(partial(times, factor=3))
    with emulate_gpu(meanings={times: lambda x, factor: factor * x}):
        y = apply(lambda smem: triple(smem[...]), X)
    np.testing.assert_array_equal(y, 3 * X)


def test_references_are_read_and_their_races_are_found():
    meanings = {"doubled": lambda x: 2 * x}
    with emulate_gpu(meanings=meanings):
        y = apply(doubled, X)
    np.testing.assert_array_equal(y, 2 * X)
    with pytest.raises(RaceError), emulate_gpu(meanings=meanings):
        jax.block_until_ready(apply(doubled, X, is_waited=False))


def test_without_a_meaning_it_says_which_function_and_where():
    message = (
        r"emulate_gpu: inline function double must have a meaning, .* got none; give "
        r"one as emulate_gpu\(meanings=\{'double': \.\.\.\}\)\. .*test_meanings\.py:\d+"
    )
    with pytest.raises(NotImplementedError, match=message), emulate_gpu():
        apply(lambda smem: double(smem[...]), X)
    bound = of_values(partial(times, factor=3))
    with pytest.raises(NotImplementedError, match="function times must"), emulate_gpu():
        apply(lambda smem: bound(smem[...]), X)


def test_jax_is_as_before_after_an_error():
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret

    before = dict(vars(jaxpr_interpret.JaxprInterpreter))
    with pytest.raises(KeyError, match="of the user"), emulate_gpu():
        raise KeyError("of the user")
    assert dict(vars(jaxpr_interpret.JaxprInterpreter)) == before
