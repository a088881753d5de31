"""Each method against its definition and the known optimum, on one weight."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_definitions import (
    best_block,
    best_column,
    correlated,
    least_low_rank_error,
    optimal_brain_surgeon,
    output_error,
    top2_rows,
)
from helpers import assert_near, normal, relative_error, to_float64

from jaxkern.compress import _calibration, _low_rank, _sparse


def moment_of(x):
    return jnp.asarray(x.T @ x, jnp.float32)


def single(x):
    return jnp.asarray(x, jnp.float32)


def low_rank(w, root, rank):
    w_in, w_out = to_float64(_low_rank.closest_factors(single(w), root, rank))
    # Factors of equal norms: neither loses more than the other in 16 bits.
    np.testing.assert_allclose(
        np.linalg.norm(w_in, axis=0), np.linalg.norm(w_out, axis=1), rtol=1e-3
    )
    return w_in @ w_out


@pytest.mark.parametrize("tokens", [200, 12], ids=["many", "few"])
def test_svd_llm_reaches_the_optimum_and_svd_is_never_better(tokens):
    """With fewer tokens than features, the second moment has no Cholesky factor."""
    for seed in range(5):
        x, w = correlated(seed, tokens, 16), np.asarray(normal(seed, (16, 24)), float)
        optimum = least_low_rank_error(x, w, 5)
        aware = low_rank(w, _low_rank.root_of(moment_of(x)), 5)
        plain = low_rank(w, None, 5)
        assert output_error(x, w, aware) <= 1.001 * optimum
        assert optimum < 0.9 * output_error(x, w, plain)
        least = least_low_rank_error(np.eye(16), w, 5)
        assert output_error(np.eye(16), w, plain) <= 1.001 * least


def test_a_moment_without_a_cholesky_factor_has_a_root():
    moment = moment_of(correlated(0, 6, 16))
    assert not np.isfinite(jnp.linalg.cholesky(moment)).all()
    root = _low_rank.root_of(moment)
    assert_near(root @ root.T, moment, 1e-4)


@pytest.mark.parametrize("scale", [1e-22, 1e20])
def test_methods_are_free_of_scale(scale):
    x, w = correlated(0, 50, 16), normal(0, (16, 12))
    moment = moment_of(x)
    root = _low_rank.root_of(moment)
    for run in (
        lambda w: jnp.matmul(*_low_rank.closest_factors(w, root, 4)),
        partial(_sparse.prune, moment=moment, method="sparsegpt", transposable=False),
        partial(_sparse.prune, moment=None, method="magnitude", transposable=True),
    ):
        assert_near(run(scale * w) / scale, run(w), 1e-4)
    np.testing.assert_allclose(
        _low_rank.energies(scale * w, root), _low_rank.energies(w, root), atol=1e-6
    )


def prune(w, x, method, transposable=False):
    moment = None if method == "magnitude" else moment_of(x)
    return np.asarray(_sparse.prune(single(w), moment, method, transposable), float)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruning_reaches_the_optimum_for_uncorrelated_inputs(method):
    """Then errors of weights do not add up, and no weight can correct another."""
    w = np.asarray(normal(0, (12, 5)), float)
    x = np.eye(12) * (1 if method == "magnitude" else np.arange(1, 13))
    best = np.stack([best_column(x, column) for column in w.T], 1)
    assert relative_error(prune(w, x, method), best) < 1e-6


@pytest.mark.parametrize("rows, transposable", [(22, False), (12, True)])
def test_sparsegpt_is_its_definition(rows, transposable, monkeypatch):
    """22 rows are three blocks, the last of which is not full."""
    monkeypatch.setattr(_sparse, "BLOCK", 8)
    x, w = correlated(1, 3 * rows, rows), np.asarray(normal(2, (rows, 8)), float)
    choose = top2_rows
    if transposable:

        def choose(scores):
            return np.concatenate(
                [best_block(scores[:, :4]), best_block(scores[:, 4:])], 1
            )

    expected = optimal_brain_surgeon(w, x.T @ x, choose)
    got = prune(w, x, "sparsegpt", transposable)
    np.testing.assert_array_equal(got != 0, expected != 0)
    assert relative_error(got, expected) < 1e-3


def test_the_better_method_has_the_smaller_error_in_the_mean_of_20_problems():
    errors = {"magnitude": [], "wanda": [], "sparsegpt": []}
    for seed, (method, found) in product(range(20), errors.items()):
        x, w = correlated(seed, 96, 32), np.asarray(normal(seed, (32, 16)), float)
        lost = output_error(x, w, prune(w, x, method)) / np.linalg.norm(x @ w)
        found.append(lost)
    magnitude, wanda, sparsegpt = (np.mean(found) for found in errors.values())
    assert sparsegpt < 0.9 * wanda and wanda < 0.9 * magnitude


def test_wanda_takes_norms_and_not_squares():
    w, x = np.array([[3.0], [2.0], [1.0], [0.1]]), np.diag([1.0, 1.2, 2.5, 9.0])
    scores = np.abs(w) * np.diag(x)[:, None]
    np.testing.assert_array_equal(prune(w, x, "wanda") != 0, top2_rows(scores))


def test_transposable_masks_are_the_best_of_each_block():
    w = np.asarray(normal(3, (8, 12)), float)
    kept = prune(w, None, "magnitude", transposable=True) != 0
    for i, j in product(range(2), range(3)):
        block = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
        np.testing.assert_array_equal(kept[block], best_block(np.abs(w[block])))


def test_moments_of_batches_are_those_of_all_tokens():
    batches = [normal(i, (3, 7, 6), scale=s) for i, s in enumerate((1e-18, 1.0, 1e19))]
    for some in (batches[:1], batches, batches[::-1]):
        moment = _calibration.empty_moment(6)
        for x in some:
            moment = jax.jit(_calibration.add_inputs)(moment, x)
        rows = np.concatenate([np.asarray(x, float).reshape(-1, 6) for x in some])
        scale = float(moment.scale)
        assert scale == np.abs(rows).max()
        assert_near(moment.total, (rows / scale).T @ (rows / scale))


def tied(name, shares, cost, step=1):
    return _low_rank.Tied((name,), np.array(shares), step, cost, len(shares))


def test_ranks_for_a_size_are_the_best_there_are():
    rng = np.random.default_rng(0)
    for _ in range(10):
        some = [tied(name, np.sort(rng.exponential(size=4))[::-1], 7) for name in "abc"]
        budget = int(rng.integers(21, 84))
        ranks = _low_rank.by_size(some, budget)
        kept = sum(one.shares[:r].sum() for one, r in zip(some, ranks, strict=True))
        fitting = [r for r in product(range(1, 5), repeat=3) if 7 * sum(r) <= budget]
        best = max(
            sum(one.shares[:r].sum() for one, r in zip(some, them, strict=True))
            for them in fitting
        )
        assert 7 * sum(ranks) <= budget and kept == pytest.approx(best)


def test_dear_ranks_must_keep_more():
    """A rank that costs twice as much is worth it only if it keeps twice as much."""
    cheap, dear = tied("a", [1.0, 0.3], 1), tied("b", [1.0, 0.5], 2)
    assert _low_rank.by_size([cheap, dear], 4) == [2, 1]


def test_ranks_by_energy():
    one = tied("a", [0.5, 0.3, 0.1, 0.1], 1)
    assert [one.by_energy(e) for e in (0.1, 0.5, 0.6, 0.9, 1.0)] == [1, 1, 2, 3, 4]
    even = tied("a", [0.5, 0.2, 0.1, 0.1, 0.1], 1, step=2)
    assert even.by_energy(0.75) == 4 and even.gains() == pytest.approx([0.7, 0.2])
