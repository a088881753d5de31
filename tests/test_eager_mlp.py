"""Ops that are called without `jax.jit` again and again compile once."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest
from op_definitions import OPS

COMPILED = "/jax/core/compile/backend_compile_duration"
COUNTS: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COUNTS.append(event) if event == COMPILED else None
)

NAMES = [
    name
    for name in OPS
    if not any(word in name for word in ("attention", "cross_entropy", "rotary"))
]


@contextmanager
def counts_compilations() -> Iterator[list[str]]:
    COUNTS.clear()
    yield COUNTS


@pytest.mark.parametrize("name", NAMES)
def test_compiles_once(name):
    op, args, *_ = OPS[name]
    arrays, tree = jax.tree.flatten(args)

    def loss(*arrays):
        return op(*jax.tree.unflatten(tree, arrays)).sum()

    floating = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def call():
        op(*args)
        jax.grad(loss, floating)(*arrays)

    call()
    with counts_compilations() as counts:
        call()
    assert not counts
