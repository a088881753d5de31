"""Every op and module gives on a mesh what it gives on one device."""

from contextlib import nullcontext
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_near, mesh
from jax import P
from op_definitions import MODULES, OPS, Case, X

import jaxkern

# Mesh axes of logical axes: to split heads and hidden features, features, and samples.
RULES = [
    {"mlp": "t", "heads": "t", "kv_heads": "t", "vocab": "t", "batch": "d"},
    {"embed": "t", "rank": "d"},
    {"batch": "d"},
]


@cache
def find(name) -> Case:
    """Return the case of this name; the first argument of a module is its state."""
    if name in OPS:
        return OPS[name]
    build, x, *where = MODULES[name]
    graph, state = nnx.split(build(rngs=nnx.Rngs(0)))
    named = jax.tree.leaves(nnx.get_partition_spec(state))
    by_sample, by_feature = where or ("d--", "d-t")
    split = [
        " ".join(
            word(leaf.ndim, names, rules)
            for leaf, names in zip(jax.tree.leaves(state), named, strict=True)
        )
        for rules in RULES
    ]
    places = f"{split[0]} {by_sample}", f"{split[1]} {by_feature}"
    manual = f"{split[2]} {by_sample} >{by_sample}"
    return Case(lambda state, x: nnx.merge(graph, state)(x), (state, x), places, manual)


def word(ndim, names, rules):
    """Return an array's letters; the first of two axes with one mesh axis gets it."""
    letters = []
    for name in (*names, *[None] * (ndim - len(names))):
        letter = rules.get(name, "-")
        letters.append("-" if letter in letters else letter)
    return "".join(letters)


def parse(word: str) -> P:
    axes = {"d": "d", "t": "t", "a": ("d", "t"), "-": None}
    return P(*(axes[letter] for letter in word))


def specs(words: str) -> list[P]:
    return [parse(word) for word in words.split()]


def with_gradients(op, tree):
    """Return a function of the arguments' leaves that gives value and gradients."""

    def run(*leaves):
        def loss(leaves):
            y = op(*jax.tree.unflatten(tree, leaves))
            weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            return (y * weights).sum(), y

        (_, y), grads = jax.value_and_grad(loss, has_aux=True, allow_int=True)(leaves)
        return y, [g for g in grads if g.dtype != jax.dtypes.float0]

    return run


@cache
def on_one_device(name):
    op, args, *_ = find(name)
    leaves, tree = jax.tree.flatten(args)
    return jax.jit(with_gradients(op, tree))(*leaves)


def assert_same(got, expected):
    """Compare values, and all gradients as one vector, because some of them are 0."""
    for a, b in zip(got, expected, strict=True):
        mine, theirs = (
            np.concatenate([*map(np.ravel, jax.tree.leaves(x))]) for x in (a, b)
        )
        assert_near(mine, theirs)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("name", [*OPS, *MODULES])
def test_sharded_arguments(name, kind):
    op, args, places, _ = find(name)
    devices = mesh(kind, d=2, t=2)
    leaves, tree = jax.tree.flatten(args)
    run = with_gradients(op, tree)
    # XLA splits programs on automatic axes by itself, so one case is enough.
    for i, words in enumerate(places if kind == "explicit" else places[-1:]):
        where = [jax.NamedSharding(devices, spec) for spec in specs(words)]
        placed = jax.device_put(leaves, where)
        with jax.set_mesh(devices) if i else nullcontext():
            assert_same(jax.jit(run)(*placed), on_one_device(name))


@pytest.mark.parametrize(
    "name",
    [*(name for name, case in OPS.items() if case.manual is not None), *MODULES],
)
def test_inside_shard_map(name):
    op, args, _, manual = find(name)
    leaves, tree = jax.tree.flatten(args)
    assert manual is not None
    words, _, result = manual.partition(">")
    result, _, summed = result.partition("+")

    def local(*leaves):
        y = op(*jax.tree.unflatten(tree, leaves))
        return jax.lax.psum(y, summed) if summed else y

    split = jax.shard_map(
        local,
        mesh=mesh(d=2, t=2),
        in_specs=tuple(specs(words)),
        out_specs=parse(result.strip()),
    )
    run = with_gradients(split, jax.tree.structure((0,) * len(leaves)))
    assert_same(jax.jit(run)(*leaves), on_one_device(name))


DRAWS = {
    "straight_through": lambda x, key: jaxkern.straight_through(x, key=key),
    "reinmax": lambda x, key: jaxkern.reinmax(x, key=key),
    "binary_concrete": lambda x, key: jaxkern.binary_concrete(x, key=key),
    "gumbel_softmax": lambda x, key: jaxkern.gumbel_softmax(x, key=key),
    "reinmax_categorical": lambda x, key: jaxkern.reinmax_categorical(x, key=key),
    "mvue": lambda x, key: jaxkern.sparsify_2_4(x, method="mvue", key=key),
    "soft, its scale": lambda x, key: jaxkern.sparsify_2_4(
        x, method="soft", scale=jax.random.uniform(key)
    ),
    "clip": lambda x, key: jaxkern.straight_through(x, clip=jax.random.uniform(key)),
    "masked_matmul": lambda x, key: jaxkern.masked_matmul(
        x, jnp.eye(16), jnp.ones((4, 16, 16)), estimator="reinmax", key=key
    ),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("shared", [True, False], ids=["one input", "split"])
def test_a_key_a_device(draw, shared):
    """Each device draws with its own key, from its own input or from a shared one."""
    keys = jax.random.split(jax.random.key(1), 4)
    x = jnp.broadcast_to(X, (4, *X.shape))
    place = P() if shared else P("d")

    def local(x, keys):
        return draw(x if shared else x[0], keys[0])[None]

    split = jax.shard_map(
        local, mesh=mesh(d=4), in_specs=(place, P("d")), out_specs=P("d")
    )

    def loss(fn, x):
        y = fn(x, keys)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    run = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    each = jax.vmap(draw, (None if shared else 0, 0))
    assert_near(run(split, X if shared else x), run(each, X if shared else x))
