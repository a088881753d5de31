"""Ops that are called without jit, as in a notebook: what compiles in a first call."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh, normal

from jaxkern import (
    BlockMask,
    attention,
    block_sparse_attention,
    context_parallel_attention,
    cross_entropy,
    dilated_attention,
    merge_attention,
    rotary_embedding,
)

COMPILING = "/jax/core/compile/backend_compile_duration"
CALLS = 20
compiled = []


def count(event: str, duration_secs: float, **_: str | int) -> None:
    if event == COMPILING:
        compiled.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(count)

X, LONG = normal(0, (1, 16, 2, 4)), normal(0, (1, 260, 1, 4))
HIDDEN, HEAD = normal(1, (6, 4)), normal(2, (4, 10))
RING, BLOCKS = mesh(ring=2), BlockMask.causal(16, 16, block_size=8)
PATTERNS: Any = {"segment_lengths": [4, 16], "dilation_rates": [1, 2]}
SPLIT: Any = {"mesh": RING, "axis_name": "ring"}
TARGETS = jnp.arange(6)
# A case is an op of arrays that have gradients, and these arrays.
CASES = {
    "attention, short": (lambda x: attention(x, x, x, is_causal=True), X),
    "attention, tiles": (lambda x: attention(x, x, x, is_causal=True), LONG),
    "block-sparse": (lambda x: block_sparse_attention(x, x, x, mask=BLOCKS), X),
    "dilated": (lambda x: dilated_attention(x, x, x, **PATTERNS), X),
    "dilated, tiles": (lambda x: dilated_attention(x, x, x, **PATTERNS), LONG),
    "ring": (lambda x: context_parallel_attention(x, x, x, **SPLIT), X),
    "merge": (lambda x: merge_attention(x, x[..., 0], x, x[..., 1]), X),
    "rotary": (rotary_embedding, X),
    "cross_entropy": (lambda h, w: cross_entropy(h, w, TARGETS), HIDDEN, HEAD),
}


@pytest.mark.parametrize("op, args", [(op, x) for op, *x in CASES.values()], ids=CASES)
def test_only_the_first_call_compiles(op, args):
    def call():
        op(*args)
        value, vjp = jax.vjp(op, *args)
        return vjp(value)

    call()
    before = len(compiled)
    for _ in range(CALLS):
        call()
    assert len(compiled) == before
