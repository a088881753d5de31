"""Block states, read from the lists of a block mask."""

import numpy as np


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
