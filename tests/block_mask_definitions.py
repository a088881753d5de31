"""Block states, read from the lists of a block mask and computed of a dense one."""

import numpy as np
import pytest


def listed(num_blocks, indices, columns):
    """Return which blocks are on the lists, and assert that each list ascends."""
    num_blocks, indices = np.asarray(num_blocks), np.asarray(indices)
    on = np.zeros((*num_blocks.shape, columns), bool)
    for row in np.ndindex(num_blocks.shape):
        columns_of_row = indices[row][: num_blocks[row]]
        assert (np.diff(columns_of_row) > 0).all()
        on[row][columns_of_row] = True
    return on


def states_listed(mask):
    rows, columns = mask.grid
    part = listed(mask.kv_num_blocks, mask.kv_indices, columns)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
    part_across = listed(mask.q_num_blocks, mask.q_indices, rows)
    full_across = listed(mask.full_q_num_blocks, mask.full_q_indices, rows)
    np.testing.assert_array_equal(part_across, part.swapaxes(2, 3))
    np.testing.assert_array_equal(full_across, full.swapaxes(2, 3))
    assert not (part & full).any()
    return part + 2 * full


# (seq_q, seq_kv, block_size)
SIZES = {
    "one": (1, 1, 1),
    "whole": (64, 64, 16),
    "ragged": (100, 70, 16),
    "wide": (33, 129, 32),
    "tall": (129, 33, 32),
    "one-block": (5, 7, 128),
    "odd-block": (50, 41, 7),
}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def each_size_and(name, first, *others):
    """Parametrize all sizes with the first value, and one size with all others."""
    cases = {f"{size}-{first}": (SIZES[size], first) for size in SIZES}
    cases |= {f"ragged-{value}": (SIZES["ragged"], value) for value in others}
    return pytest.mark.parametrize(f"size, {name}", cases.values(), ids=cases)


def states_of(dense, block_size):
    """Return 0, 1, 2 for empty, partial, full blocks; dense is False past its end."""
    *leading, rows, columns = dense.shape
    past = [(0, 0)] * len(leading) + [(0, -n % block_size) for n in (rows, columns)]
    padded = np.pad(dense, past)
    rows, columns = (n // block_size for n in padded.shape[-2:])
    tiles = padded.reshape(*leading, rows, block_size, columns, block_size)
    return tiles.any((-3, -1)).astype(int) + tiles.all((-3, -1))


def assert_is(mask, dense, exact_lists=True):
    dense = np.asarray(dense)
    dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
    assert mask.shape == dense.shape
    np.testing.assert_array_equal(mask.to_dense(), dense)
    got, expected = states_listed(mask), states_of(dense, mask.block_size)
    if exact_lists:
        np.testing.assert_array_equal(got, expected)
    else:
        assert (got[expected == 1] == 1).all()
        assert (got[expected == 0] != 2).all() and (got[expected == 2] != 0).all()
    assert mask.density == pytest.approx((got > 0).mean())


def positions(size):
    return np.arange(size[0])[:, None], np.arange(size[1])
