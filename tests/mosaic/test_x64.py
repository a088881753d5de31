"""`jax.enable_x64` changes no kernel of 16-bit arrays."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import normal, with_vjp

import jaxkern
from jaxkern import BlockMask, pack_2_4, pack_mask, straight_through
from jaxkern.testing.compiler import lower

BF16 = jnp.bfloat16
HIDDEN, RANK, WIDTH, TOKENS = 512, 64, 256, 128


pytestmark = pytest.mark.usefixtures("chooses_hopper")


def array(seed: int, *shape: int) -> Any:
    return normal(seed, shape, BF16)


X, UP, DOWN = array(0, TOKENS, RANK), array(1, RANK, HIDDEN), array(2, HIDDEN, RANK)
WIDE, FIRST, LAST = (
    array(7, TOKENS, WIDTH),
    array(8, WIDTH, RANK),
    array(9, RANK, WIDTH),
)
QUERY = array(4, 1, TOKENS, 2, 64)
SAMPLES, LOGITS = array(5, 2, TOKENS, RANK), array(6, 2, RANK, HIDDEN)
MASK = BlockMask.causal(TOKENS, TOKENS, block_size=64)


def low_rank(x, **options):
    fn = partial(jaxkern.low_rank_relu2, implementation="mosaic_gpu", **options)
    return fn(x, (FIRST, UP), (DOWN, LAST))


CALLS = {
    "attention": lambda q: jaxkern.attention(q, q, q, implementation="mosaic_gpu"),
    "blocks": lambda q: jaxkern.block_sparse_attention(
        q, q, q, mask=MASK, implementation="mosaic_gpu"
    ),
    "flash_mlp": lambda x: jaxkern.flash_mlp(
        x[None], UP[None], DOWN[None], implementation="mosaic_gpu"
    ),
    "swiglu": lambda x: jaxkern.swiglu(x, UP, UP, DOWN, implementation="mosaic_gpu"),
    "relu2": low_rank,
    "2:4": partial(low_rank, sparsity="2:4"),
    "2:4-soft": partial(low_rank, sparsity="2:4-soft"),
    "masked": lambda x: jaxkern.masked_matmul(
        x, UP, LOGITS, estimator=straight_through, implementation="mosaic_gpu"
    ),
    "packed mask": lambda x: jaxkern.masked_matmul(
        x, UP, pack_mask(LOGITS), implementation="mosaic_gpu"
    ),
    "matmul_2_4": lambda x: jaxkern.matmul_2_4(
        pack_2_4(x), UP, implementation="mosaic_gpu"
    ),
}
INPUTS: dict[str, Any] = dict.fromkeys(("attention", "blocks"), QUERY)
INPUTS |= dict.fromkeys(("masked", "packed mask"), SAMPLES)
INPUTS |= dict.fromkeys(("relu2", "2:4", "2:4-soft"), WIDE)


@cache
def lowered(name: str, is_wide: bool) -> list[bytes]:
    """Return the kernels of forward and backward."""
    call, x = CALLS[name], INPUTS.get(name, X)
    with jax.enable_x64(is_wide):
        return lower(with_vjp(call), ((x,), jax.eval_shape(call, x)))


@pytest.mark.parametrize("name", CALLS)
def test_kernels_lower(name):
    assert lowered(name, True)


# JAX 0.11 puts numbers of files that it might write into the kernels.
@pytest.mark.newest
@pytest.mark.parametrize("name", CALLS)
def test_kernels_are_the_same(name):
    """The kernels are equal byte by byte; the emulator has no 64-bit integers."""
    assert lowered(name, False) == lowered(name, True)


def test_a_traced_mask_lowers():
    def call(q, mask):
        fn = partial(jaxkern.block_sparse_attention, implementation="mosaic_gpu")
        return fn(q, q, q, mask=mask)

    with jax.enable_x64(True):
        assert len(lower(call, (QUERY, MASK))) == 1
