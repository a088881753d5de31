"""The methods of `jaxkern.compress` by their definitions, in float64."""

from itertools import combinations, product

import numpy as np

PAIRS = [np.isin(range(4), pair) for pair in combinations(range(4), 2)]


def correlated(seed, tokens, features):
    """Return inputs whose features have other sizes and are correlated."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.standard_normal(features))
    mix = np.eye(features) + rng.standard_normal((features, features)) / 4
    return rng.standard_normal((tokens, features)) @ mix * sizes


def output_error(x, w, other):
    return np.linalg.norm(x @ (w - other))


def least_low_rank_error(x, w, rank):
    """The error of the best product of this rank, by Eckart and Young on x w."""
    return np.sqrt((np.linalg.svd(x @ w, compute_uv=False)[rank:] ** 2).sum())


def best_column(x, w):
    """Return one column with two of each four weights of it and the least error."""
    groups = len(w) // 4
    masks = (np.concatenate(mask) for mask in product(PAIRS, repeat=groups))
    return min((mask * w for mask in masks), key=lambda v: output_error(x, w, v))


def best_block(scores):
    """Return the 4 x 4 mask, two in each row and column, of most squared scores."""
    bits = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    masks = bits.reshape(-1, 4, 4)
    fits = ((masks.sum(1) == 2) & (masks.sum(2) == 2)).all(1)
    return max(masks[fits], key=lambda mask: (mask * scores**2).sum()) > 0


def top2_rows(scores):
    """Return the mask of the two largest of each four along the first axis."""
    padded = np.pad(scores, ((0, -len(scores) % 4), (0, 0)), constant_values=-1.0)
    groups = padded.reshape(-1, 4, scores.shape[1])
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :2], True, axis=1)
    return mask.reshape(padded.shape)[: len(scores)]


def optimal_brain_surgeon(w, moment, choose):
    """Prune row after row; each error goes to the rows behind by the inverse of theirs.

    It is SparseGPT without its Cholesky factors. `choose` returns the mask of four rows
    from their scores, |w| over the root of the diagonal of that inverse.
    """
    w, rows = w.copy(), len(w)
    moment = moment + 0.01 * np.diag(moment).mean() * np.eye(rows)
    inverses = [np.linalg.inv(moment[i:, i:]) for i in range(rows)]
    kept = np.empty((4, w.shape[1]), bool)
    for i, inverse in enumerate(inverses):
        if i % 4 == 0:
            last = min(i + 4, rows)
            diagonal = np.array([inverses[j][0, 0] for j in range(i, last)])
            kept = choose(np.abs(w[i:last]) / np.sqrt(diagonal)[:, None])
        dropped = np.where(kept[i % 4], 0, w[i])
        w[i:] -= inverse[:, :1] * dropped / inverse[0, 0]
        w[i] = np.where(kept[i % 4], w[i], 0)
    return w


def silu(z):
    return z / (1 + np.exp(-z))
