"""Ops that are called without `jax.jit`, as in a notebook, compile in their first call.

Without this, each call would compile and keep another program, until the process
exceeds Linux's limit of memory mappings.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh, normal
from op_definitions import OPS

from jaxkern import (
    BlockMask,
    Dilation,
    attention,
    block_sparse_attention,
    context_parallel_attention,
    cross_entropy,
    dilated_attention,
    merge_attention,
    rotary_embedding,
)

COMPILING = "/jax/core/compile/backend_compile_duration"
CALLS = 3
compiled = []


def listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == COMPILING:
        compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(listen)

X, LONG = normal(0, (1, 16, 2, 4)), normal(0, (1, 260, 1, 4))
HIDDEN, HEAD = normal(1, (6, 4)), normal(2, (4, 10))
BLOCKS = BlockMask.causal(16, 16, block_size=8)
PATTERNS: Any = {"dilation": Dilation([4, 16], [1, 2])}
TARGETS = jnp.arange(6)


def attend_on_a_mesh(x):
    return context_parallel_attention(x, x, x, mesh=mesh(ring=2), axis_name="ring")


def merge_with_itself(x):
    return merge_attention(x, x[..., 0], x, x[..., 1])


# A case is a function of differentiable arrays, and these arrays.
ATTENTION = {
    "attention, short": (lambda x: attention(x, x, x, is_causal=True), (X,)),
    "attention, tiles": (lambda x: attention(x, x, x, is_causal=True), (LONG,)),
    "block-sparse": (lambda x: block_sparse_attention(x, x, x, mask=BLOCKS), (X,)),
    "dilated": (lambda x: dilated_attention(x, x, x, **PATTERNS), (X,)),
    "dilated, tiles": (lambda x: dilated_attention(x, x, x, **PATTERNS), (LONG,)),
    "ring": (attend_on_a_mesh, (X,)),
    "merge": (merge_with_itself, (X,)),
    "rotary": (rotary_embedding, (X,)),
    "cross_entropy": (
        lambda hidden, head: cross_entropy(hidden, head, TARGETS),
        (HIDDEN, HEAD),
    ),
}
HERE = ("attention", "cross_entropy", "rotary")
OTHERS = {
    name: (op, args)
    for name, (op, args, *_) in OPS.items()
    if not any(word in name for word in HERE)
}
CASES = ATTENTION | OTHERS


@pytest.mark.parametrize("op, args", CASES.values(), ids=CASES)
def test_only_the_first_call_compiles(op, args):
    leaves, tree = jax.tree.flatten(args)
    floating = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def of_floating(*given):
        filled = dict(enumerate(leaves)) | dict(zip(floating, given, strict=True))
        return op(*jax.tree.unflatten(tree, filled.values()))

    def call():
        op(*args)
        value, vjp = jax.vjp(of_floating, *(leaves[i] for i in floating))
        return vjp(value)

    call()
    before = len(compiled)
    for _ in range(CALLS):
        call()
    assert len(compiled) == before
