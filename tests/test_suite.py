"""Tests of the set-up that all other tests rely on."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import io_callback

from jaxkern import attention


def test_less_compiling_changes_no_program():
    """XLA makes the same program with LLVM's passes and without them."""
    args = [jnp.zeros((1, 20, 2, 16), jnp.bfloat16)] * 3

    def gradients(*args):
        return jax.grad(lambda *args: attention(*args).astype(jnp.float32).sum())(*args)

    programs = []
    for fast in (False, True):
        jax.config.update("jax_disable_most_optimizations", fast)
        # A new function each time, because JAX keeps compiled programs by function.
        fresh = jax.jit(lambda *args: gradients(*args))
        programs.append(fresh.lower(*args).compile().as_text())
    assert programs[0] == programs[1] and "fusion" in programs[0]


def test_what_make_test_leaves_out_exists(left_out_in_vain):
    assert left_out_in_vain == []


@pytest.mark.usefixtures("interpreted")
def test_callbacks_get_numbers_as_they_are():
    """The emulator replaces how JAX hands arguments to callbacks."""
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)

    @jax.jit
    def double(x, n):
        shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((), "i4")
        return io_callback(lambda x, n: (x + x, n + 1), shapes, x, n)

    y, n = double(x, 3)
    assert y.dtype == jnp.bfloat16 and n.dtype == jnp.int32 and n == 4
    assert (y == 2 * x).all()


def test_a_machine_with_one_gpu_collects_the_gpu_tests():
    """No module may need several devices when it is imported."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only"]
    # The command of `benchmarks/gpu.sh`, without options for packages it may lack.
    command += ["-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    one = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=one, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "test_attend.py" in done.stdout and "test_flash.py" in done.stdout
