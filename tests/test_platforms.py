"""A program traced beside a Hopper GPU runs wherever its arrays are.

`None` picks a kernel while JAX traces, before it is known where the arrays will be. The
program must also compile for the CPU.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh, normal

import jaxkern
from jaxkern import BlockMask
from jaxkern._core.dispatch import run

BF16 = jnp.bfloat16


def shape(*sizes, dtype=BF16):
    return jax.ShapeDtypeStruct(sizes, dtype)


X, W, DOWN = shape(16384, 512), shape(512, 1408), shape(1408, 512)
PAIR, BACK = (shape(512, 256), shape(256, 2736)), (shape(2736, 256), shape(256, 512))
TOKENS = shape(4, 1024, 4, 64)
LOGITS = shape(8, 256, 256)
ATTENTION = (TOKENS,) * 3
DILATION = jaxkern.Dilation((512, 1024), (1, 2))


def multiply_packed(x, w):
    return jaxkern.matmul_2_4(jaxkern.pack_2_4(x), w)


def multiply_by_packed(x, up, down):
    up, down = jax.tree.map(lambda w: jaxkern.pack_2_4(w.T), (up, down))
    return jaxkern.low_rank_relu2(x, up, down)


CASES = {
    "swiglu": (jaxkern.swiglu, (X, W, W, DOWN)),
    "low_rank_swiglu": (jaxkern.low_rank_swiglu, (X, PAIR, PAIR, BACK)),
    "low_rank_relu2": (jaxkern.low_rank_relu2, (X, PAIR, BACK)),
    "low_rank_relu2, packed": (multiply_by_packed, (X, PAIR, BACK)),
    "matmul_2_4": (multiply_packed, (X, shape(512, 256))),
    "flash_mlp": (
        jaxkern.flash_mlp,
        (shape(16, 4096, 64), shape(16, 64, 512), shape(16, 512, 64)),
    ),
    "attention": (
        partial(jaxkern.attention, return_lse=True, is_causal=True),
        ATTENTION,
    ),
    "block_sparse_attention": (
        partial(jaxkern.block_sparse_attention, mask=BlockMask.causal(1024, 1024)),
        ATTENTION,
    ),
    "dilated_attention": (
        partial(jaxkern.dilated_attention, dilation=DILATION),
        ATTENTION,
    ),
    "masked_matmul": (
        partial(jaxkern.masked_matmul, estimator=jaxkern.reinmax),
        (shape(8, 512, 256), shape(256, 256), LOGITS),
    ),
    "masked_bilinear": (
        partial(jaxkern.masked_bilinear, estimator=jaxkern.reinmax),
        (shape(8, 512, 256), (shape(256, 256),) * 3, (LOGITS,) * 3),
    ),
}


def forward_and_backward(op):
    def step(*args):
        results, pull = jax.vjp(op, *args)
        return results, pull(jax.tree.map(jnp.ones_like, results))

    return step


def kernels(lowered):
    return lowered.as_text().count("mosaic_gpu_v2")


def lower(step, *args):
    return {
        platform: jax.jit(step).trace(*args).lower(lowering_platforms=(platform,))
        for platform in ("cuda", "cpu")
    }


@pytest.mark.usefixtures("chooses_hopper")
@pytest.mark.parametrize("name", CASES)
def test_the_platform_of_a_program_picks_what_none_may_run(name):
    op, args = CASES[name]
    lowered = lower(forward_and_backward(op), *args)
    assert kernels(lowered["cuda"]) > 0
    assert kernels(lowered["cpu"]) == 0


@pytest.mark.usefixtures("chooses_hopper")
def test_a_named_kernel_is_the_only_form_of_its_program():
    named = partial(jaxkern.swiglu, implementation="mosaic_gpu")
    assert "platform_index" not in str(jax.make_jaxpr(named)(X, W, W, DOWN))
    assert "platform_index" in str(jax.make_jaxpr(jaxkern.swiglu)(X, W, W, DOWN))


def scanned(op):
    def scan(query, key, value):
        return jax.lax.scan(lambda x, _: (op(x, key, value), None), query, length=2)[0]

    return scan


def by_device(op):
    spec = jax.P("data")
    return jax.shard_map(op, mesh=mesh(data=2), in_specs=spec, out_specs=spec)


TRANSFORMS = {
    "checkpoint": jax.checkpoint,
    "vmap": partial(jax.vmap, in_axes=1, out_axes=1),
    "scan": scanned,
    "shard_map": by_device,
}


@pytest.mark.usefixtures("chooses_hopper")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_in_every_transformation(name):
    x = shape(2, *(2,) * (name == "vmap"), 512, 2, 64)
    step = forward_and_backward(TRANSFORMS[name](jaxkern.attention))
    lowered = lower(step, x, x, x)
    assert kernels(lowered["cuda"]) > 0
    assert kernels(lowered["cpu"]) == 0


@pytest.mark.usefixtures("chooses_hopper")
def test_a_ring_picks_by_the_platform():
    spec = jax.P(None, "ring")
    op = jax.shard_map(
        partial(jaxkern.ring_attention, axis_name="ring", is_causal=True),
        mesh=mesh(ring=2),
        in_specs=spec,
        out_specs=spec,
    )
    lowered = lower(forward_and_backward(op), *ATTENTION)
    assert kernels(lowered["cuda"]) > 0
    assert kernels(lowered["cpu"]) == 0


@pytest.mark.usefixtures("chooses_hopper")
def test_a_program_traced_beside_a_gpu_computes_on_the_cpu():
    args = [normal(i, (1, 512, 2, 8)).astype(BF16) for i in range(3)]
    by_xla = partial(jaxkern.attention, implementation="xla")
    found, expected = (
        jax.jit(forward_and_backward(op))(*args) for op in (jaxkern.attention, by_xla)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.usefixtures("chooses_hopper")
def test_each_platform_runs_its_own_form():
    """The two forms have different values, which show the form that ran."""
    x = jnp.ones(3)

    def double(x):
        return 2 * x

    def negative(x):
        return -x

    options: Any = {"xla": double, "kernel": negative, "unsupported": lambda: None}
    for name, expected in ((None, 2 * x), ("mosaic_gpu", -x), ("xla", 2 * x)):
        of = partial(run, "op", name, **options)
        np.testing.assert_array_equal(jax.jit(of)(x), expected)
        # Outside of a program the device of the arrays is known.
        np.testing.assert_array_equal(of(x), 2 * x if name == "xla" else -x)
    slow = partial(run, "op", None, **options, faster=False)
    np.testing.assert_array_equal(slow(x), 2 * x)
    # An array that the forms hold is traced, too.
    held = jax.jit(lambda y: run("op", None, x, **options, held=(y,)))
    np.testing.assert_array_equal(held(x), 2 * x)
    # One traced array is enough; the others may be constants of the program.
    two: Any = {"xla": jnp.add, "kernel": jnp.subtract, "unsupported": lambda: None}
    add_to_constant = jax.jit(lambda y: run("op", None, x, y, **two))
    np.testing.assert_array_equal(add_to_constant(x), 2 * x)
