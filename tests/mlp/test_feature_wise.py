"""`gradient="feature_wise"`, and how the other gradients of 2:4 differ from it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_near,
    low_rank_args,
    mesh,
    normal,
    op_args,
    relative_error,
    to_float64,
    top2_float64,
    value_and_vjp,
)
from jax.sharding import PartitionSpec as P

from jaxkern import low_rank_relu2
from jaxkern._mlp.feature_wise import densest, sparsify_along_tokens

# (tokens, d_in, hidden, rank, d_out): one token, counts that are no multiple of four,
# and many tokens.
SIZES = [(1, 3, 5, 1, 2), (7, 12, 21, 4, 9), (18, 33, 64, 8, 33), (64, 24, 90, 7, 24)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))


def feature_wise(x, up, down):
    return low_rank_relu2(x, up, down, sparsity="2:4", gradient="feature_wise")


def densest_by_hand(a):
    features = sorted(range(a.shape[1]), key=lambda j: (-np.count_nonzero(a[:, j]), j))
    return features[: int(np.ceil(a.shape[1] / 20))]


def token_groups(count):
    """Yield the groups of tokens that are a quarter of all tokens apart."""
    quarter = int(np.ceil(count / 4))
    for i in range(quarter):
        yield [t for t in range(i, 4 * quarter, quarter) if t < count]


def along_tokens_by_hand(x, dense):
    kept = np.zeros_like(x)
    for j in range(x.shape[1]):
        for group in token_groups(len(x)):
            by_size = sorted(group, key=lambda t: -abs(x[t, j]))
            chosen = group if j in dense else by_size[:2]
            kept[chosen, j] = x[chosen, j]
    return kept


def feature_wise_float64(x, up, down, g, rounded=lambda a: a):
    """The recipe's equations, `rounded` where the library rounds to its dtype."""
    u = rounded(x @ up[0])
    z = rounded(u @ up[1])
    a = rounded(np.maximum(z, 0) ** 2)
    h = rounded((a * top2_float64(a)) @ down[0])
    d_h = rounded(g @ down[1].T)
    d_z = rounded(rounded(d_h @ down[0].T) * 2 * np.maximum(z, 0))
    d_u = rounded(d_z @ up[1].T)
    dense = densest_by_hand(a)
    d_up = x.T @ d_u, u.T @ along_tokens_by_hand(d_z, dense)
    d_down = along_tokens_by_hand(a, dense).T @ d_h, h.T @ g
    return rounded(h @ down[1]), jax.tree.map(rounded, (d_u @ up[0].T, d_up, d_down))


@sizes
def test_values_and_gradients(size):
    x, up, _, down, g = low_rank_args(size, jnp.float32)
    got = value_and_vjp(feature_wise, (x, up, down), g)
    assert_near(got, feature_wise_float64(*to_float64((x, up, down, g))))
    dense = value_and_vjp(
        lambda *a: low_rank_relu2(*a, sparsity="2:4"), (x, up, down), g
    )
    np.testing.assert_array_equal(got[0], dense[0])


@pytest.mark.parametrize(
    "size, dtype",
    [
        *((size, jnp.bfloat16) for size in SIZES),
        *((SIZES[2], dtype) for dtype in (jnp.float32, jnp.float16)),
    ],
)
def test_ties_and_dtypes(size, dtype):
    """Sums of small integers are exact, so that only ties and roundings matter."""
    args = low_rank_args(size, jnp.float32)
    x, up, _, down, g = jax.tree.map(lambda a: jnp.sign(a).astype(dtype), args)
    got = value_and_vjp(feature_wise, (x, up, down), g)
    assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype(dtype)}

    def rounded(a):
        return a.astype(dtype).astype(np.float64)

    expected = feature_wise_float64(*to_float64((x, up, down, g)), rounded=rounded)
    jax.tree.map(np.testing.assert_array_equal, to_float64(got), expected)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        x, up, _, down, g = low_rank_args(SIZES[2], jnp.float64)
        got = value_and_vjp(feature_wise, (x, up, down), g)
        exact = feature_wise_float64(*to_float64((x, up, down, g)))
        assert relative_error(got, exact) < 1e-12


def hidden_gradients(gradient, hidden, d_hidden):
    """Return a and dz as weights' gradients use them; other factors are identities."""
    tokens, one = len(hidden), jnp.eye(len(hidden))
    z = jnp.sqrt(jnp.maximum(hidden, 0)) - jnp.maximum(-hidden, 0)
    up, down = (one, z), (d_hidden.T, one)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "low_rank_relu2: rank of")
        pull = jax.vjp(
            lambda *w: low_rank_relu2(one, *w, sparsity="2:4", gradient=gradient),
            up,
            down,
        )[1]
    (_, d_up), (d_down, _) = pull(jnp.eye(tokens))
    return np.asarray(d_down.T), np.asarray(d_up)


def graded_activations(tokens=40):
    """Return as many features as tokens, where feature j is positive for j tokens."""
    size = np.random.default_rng(0).uniform(0.1, 1, (tokens, tokens))
    rank = np.argsort(np.argsort(size, axis=0), axis=0)
    return jnp.asarray(np.where(rank < np.arange(tokens), size, -size), jnp.float32)


def test_sparse_features_keep_two_of_four_tokens_and_the_densest_keep_all():
    hidden = graded_activations()
    by_feature, d_z = hidden_gradients("feature_wise", hidden, normal(1, hidden.shape))
    straight = hidden_gradients("straight_through", hidden, normal(1, hidden.shape))
    whole = np.maximum(hidden, 0)
    # The features with the fewest zeros; those with the most are 0 and 1.
    assert densest_by_hand(whole) == [39, 38]
    assert_near(by_feature[:, 38:], whole[:, 38:])
    np.testing.assert_array_equal(d_z[:, 38:], straight[1][:, 38:])
    for kept in (by_feature, d_z):
        counts = [np.count_nonzero(kept[g], axis=0) for g in token_groups(len(kept))]
        assert np.max(counts, axis=0)[:38].max() == 2
        assert (np.max(counts, axis=0)[38:] == 4).all()
    assert not by_feature[:, 0].any()


def test_straight_through_differs_from_exact_where_positives_were_dropped():
    hidden, d_hidden = graded_activations(), normal(1, (40, 40))
    kept, d_z = hidden_gradients("exact", hidden, d_hidden)
    same_kept, straight = hidden_gradients("straight_through", hidden, d_hidden)
    whole = np.maximum(hidden, 0)
    mask = top2_float64(whole)
    np.testing.assert_array_equal(kept, same_kept)
    assert_near(kept, whole * mask)
    assert_near(d_z, d_hidden * mask * 2 * np.sqrt(whole))
    assert_near(straight, d_hidden * 2 * np.sqrt(whole))
    dropped = (whole > 0) & (mask == 0)
    np.testing.assert_array_equal(d_z != straight, dropped)
    assert 0.1 < dropped.mean() < 0.4
    default = hidden_gradients(None, hidden, d_hidden)
    np.testing.assert_array_equal(default, (kept, d_z))


@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 130])
def test_along_tokens(tokens):
    x = normal(0, (tokens, 21))
    dense = densest(x)
    assert int(dense.sum()) == 2
    got = sparsify_along_tokens(x, dense)
    expected = along_tokens_by_hand(np.asarray(x), np.flatnonzero(dense))
    np.testing.assert_array_equal(got, expected)
    # Tokens are counted over all batch axes.
    if tokens % 2 == 0:
        batched = sparsify_along_tokens(x.reshape(2, tokens // 2, 21), dense)
        np.testing.assert_array_equal(batched.reshape(got.shape), got)


def test_a_group_is_no_neighbours():
    token = jnp.arange(16)[:, None] * jnp.ones((1, 21), int)
    dense = jnp.arange(21) == 0
    alike = jnp.where(token < 4, 1.0, 0.0)
    np.testing.assert_array_equal(sparsify_along_tokens(alike, dense), alike)
    group = jnp.where(token % 4 == 0, 1.0, 0.0)
    kept = np.asarray(sparsify_along_tokens(group, dense))
    assert kept[:, 0].sum() == 4 and (kept[:, 1:].sum(0) == 2).all()


def loss_gradient(op):
    def loss(x, weights):
        y = op(x, weights["up"], weights["down"])
        return (y**2).sum(), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def weights_of(**sizes):
    x, weights = op_args(**sizes)
    return x, {name: weights[name] for name in ("up", "down")}


def test_transforms():
    x, weights = weights_of()
    gradient = loss_gradient(feature_wise)
    expected = gradient(x, weights)
    assert_near(jax.jit(gradient)(x, weights), expected)
    assert_near(
        jax.jit(loss_gradient(jax.checkpoint(feature_wise)))(x, weights), expected
    )
    parts = x.reshape(4, 4, -1)
    each = jax.tree.map(
        lambda *a: jnp.stack(a), *[gradient(part, weights) for part in parts]
    )
    assert_near(jax.jit(jax.vmap(gradient, (0, None)))(parts, weights), each)
    scanned = jax.lax.scan(lambda c, part: (c, gradient(part, weights)), 0, parts)[1]
    assert_near(scanned, each)


def test_batch_axes_are_one():
    x, weights = weights_of()
    rows, batched = (
        loss_gradient(feature_wise)(a, weights) for a in (x, x.reshape(2, 8, -1))
    )
    assert_near(batched[1][1], rows[1][1])
    assert_near(batched[1][0].reshape(x.shape), rows[1][0])
    single = loss_gradient(feature_wise)(x[0], weights)
    assert_near(single[1][1], loss_gradient(feature_wise)(x[:1], weights)[1][1])


def test_saved_for_the_backward():
    size = 256, 32, 128, 8, 32
    x, up, _, down, _ = low_rank_args(size, jnp.bfloat16)
    leaves = jax.tree.leaves(jax.vjp(feature_wise, x, up, down)[1])
    saved = sum(a.nbytes for a in {id(a): a for a in leaves}.values())
    arguments = sum(a.nbytes for a in jax.tree.leaves((x, up, down)))
    # One activation, the pre-activation, and the first and third matmuls' results.
    assert saved <= arguments + 2 * 256 * (128 + 2 * 8)


WIDEN, NARROW = P(None, "tensor"), P("tensor", None)
SPECS = {"up": (P(), WIDEN), "down": (NARROW, P())}


def test_shard_map_sparsifies_on_each_device():
    both = mesh(data=2, tensor=4)
    x, weights = weights_of()

    def local(x, up, down):
        return jax.lax.psum(feature_wise(x, up, down), "tensor")

    specs = P("data"), SPECS["up"], SPECS["down"]
    sharded = jax.shard_map(local, mesh=both, in_specs=specs, out_specs=P("data"))
    got = jax.jit(loss_gradient(sharded))(x, weights)
    value, (d_x, d_weights) = loss_gradient(feature_wise)(x, weights)
    assert_near((got[0], got[1][0]), (value, d_x))
    # By hand, for each half of the tokens and each quarter of the features.
    g = to_float64(2 * value[1])
    up, down = to_float64((weights["up"], weights["down"]))
    d_up, d_down = np.zeros_like(up[1]), np.zeros_like(down[0])
    for rows in (slice(0, 8), slice(8, 16)):
        for columns in (slice(i, i + 16) for i in range(0, 64, 16)):
            part = (up[0], up[1][:, columns]), (down[0][columns], down[1])
            _, (_, part_up, part_down) = feature_wise_float64(
                to_float64(x)[rows], *part, g[rows]
            )
            d_up[:, columns] += part_up[1]
            d_down[columns] += part_down[0]
    assert_near((got[1][1]["up"][1], got[1][1]["down"][0]), (d_up, d_down))
    assert relative_error(d_up, d_weights["up"][1]) > 1e-3
