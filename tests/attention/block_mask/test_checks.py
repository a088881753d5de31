import jax
import numpy as np
import pytest
from helpers import untyped

from jaxkern import BlockMask

CAUSAL = BlockMask.causal(64, 64, block_size=16)
IDS = np.zeros(64, np.int32)


def under_jit(fn, *args):
    return lambda: jax.jit(fn)(*args)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: untyped.BlockMask.causal(0, 4),
            ValueError,
            "BlockMask.causal: seq_q must be an integer of at least 1, got 0",
        ),
        (
            lambda: untyped.BlockMask.causal(4, 4, block_size=1.5),
            ValueError,
            "block_size must be an integer of at least 1, got 1.5",
        ),
        (
            lambda: untyped.BlockMask.local_window(4, 4, window=-1),
            ValueError,
            "BlockMask.local_window: window must be an integer of at least 0, got -1",
        ),
        (
            lambda: untyped.BlockMask.local_window(64, 64, window=True),
            ValueError,
            "local_window: window must be an integer of at least 0, got True",
        ),
        (
            lambda: untyped.BlockMask.dilated(4, 4, rates=[1, 0]),
            ValueError,
            r"BlockMask.dilated: rates\[1\] must be an integer of at least 1, got 0",
        ),
        (
            lambda: untyped.BlockMask.strided(4, 4, stride=0),
            ValueError,
            "BlockMask.strided: stride must be an integer of at least 1, got 0",
        ),
        (
            lambda: untyped.BlockMask.global_local(4, 4, global_tokens=-2, window=1),
            ValueError,
            "global_tokens must be an integer of at least 0, got -2",
        ),
        (
            lambda: untyped.BlockMask.document([0, 1]),
            TypeError,
            "BlockMask.document: segment_ids must be an array, got list",
        ),
        (
            lambda: untyped.BlockMask.document(np.zeros(4)),
            TypeError,
            "segment_ids must be an integer array, got float64",
        ),
        (
            lambda: untyped.BlockMask.document(IDS.reshape(2, 2, 16)),
            ValueError,
            r"segment_ids must have shape \(seq,\) or .*, got \(2, 2, 16\)",
        ),
        (
            lambda: untyped.BlockMask.document(IDS[:0]),
            ValueError,
            r"segment_ids must have shape .* and no empty axis, got \(0,\)",
        ),
        (
            lambda: untyped.BlockMask.from_blocks(np.ones((2, 2))),
            TypeError,
            "BlockMask.from_blocks: blocks must be a boolean array, got float64",
        ),
        (
            lambda: untyped.BlockMask.from_blocks(np.ones(2, bool)),
            ValueError,
            r"blocks must have shape \(q, kv\), .*, got \(2,\)",
        ),
        (
            lambda: untyped.BlockMask.from_blocks(np.ones((2, 2), bool), seq_q=128),
            ValueError,
            "from_blocks: seq_q must fill 2 blocks of 128, got 128",
        ),
        (
            lambda: untyped.BlockMask.from_dense(IDS.reshape(8, 8)),
            TypeError,
            "BlockMask.from_dense: mask must be a boolean array, got int32",
        ),
        (
            under_jit(BlockMask.from_dense, np.ones((4, 4), bool)),
            TypeError,
            "from_dense: mask must have values, got an array traced by jit",
        ),
        (
            lambda: untyped.BlockMask.from_mask_fn(lambda b, h, q, k: q - k, 4, 4),
            TypeError,
            "BlockMask.from_mask_fn: mask_fn must give booleans, got int32",
        ),
        (
            lambda: untyped.BlockMask.from_mask_fn(lambda q, k: q >= k, 4, 4),
            TypeError,
            r"from_mask_fn: mask_fn must take four arguments, .* got one of \(q, k\)",
        ),
        (
            lambda: untyped.BlockMask.from_blocks(
                np.ones((2, 2), bool), mask_fn=lambda q, k: q >= k
            ),
            TypeError,
            "from_blocks: mask_fn must take four arguments",
        ),
        (
            lambda: BlockMask.from_mask_fn(lambda b, h, q, k: q >= k and b == 0, 4, 4),
            TypeError,
            "from_mask_fn: mask_fn must compute with arrays, by &, .* by if, and, or",
        ),
        (
            lambda: BlockMask.from_blocks(
                np.ones((2, 2), bool), mask_fn=lambda b, h, q, k: not q
            ),
            TypeError,
            "from_blocks: mask_fn must compute with arrays",
        ),
        (
            lambda: CAUSAL and CAUSAL,
            TypeError,
            "BlockMask: masks must be combined by & and |, got `and`, `or`",
        ),
        (
            lambda: untyped.BlockMask.from_mask_fn(3, 4, 4),
            TypeError,
            "from_mask_fn: mask_fn must be a function, got int",
        ),
        (
            lambda: untyped.BlockMask.from_mask_fn(lambda b, h, q, k: (q, k), 4, 4),
            TypeError,
            "from_mask_fn: mask_fn must give booleans, got tuple",
        ),
        (
            lambda: untyped.BlockMask.local_window(4, 4, window=True),
            ValueError,
            "window must be an integer of at least 0, got True",
        ),
        (
            lambda: BlockMask.causal(2**31, 4),
            ValueError,
            r"seq_q must be less than 2\*\*31, got 2147483648",
        ),
        (
            lambda: BlockMask.causal(4, 4, block_size=2**31),
            ValueError,
            r"block_size must be less than 2\*\*31, got 2147483648",
        ),
        (
            under_jit(
                lambda x: BlockMask.from_mask_fn(lambda b, h, q, k: x[q] == k, 4, 4),
                np.arange(4),
            ),
            TypeError,
            "from_mask_fn: the result of mask_fn must have values, got an array traced",
        ),
        (
            under_jit(lambda x: CAUSAL.to_string() and x.to_string(), CAUSAL),
            TypeError,
            "BlockMask.to_string: mask must have values, got an array traced",
        ),
        (
            lambda: CAUSAL & BlockMask.causal(64, 64, block_size=8),
            ValueError,
            r"BlockMask &: \(seq_q, seq_kv, block_size\) of both must be equal, "
            r"got \(64, 64, 16\) and \(64, 64, 8\)",
        ),
        (
            lambda: (
                BlockMask.from_blocks(np.ones((2, 1, 1), bool))
                | BlockMask.from_blocks(np.ones((3, 1, 1), bool))
            ),
            ValueError,
            r"batch and heads of both must be equal or 1, got \(1, 2\) and \(1, 3\)",
        ),
        (
            lambda: untyped.BlockMask.causal(4, 4) & True,
            TypeError,
            "BlockMask &: both must be BlockMasks, got bool; BlockMask.from_dense",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


MAKERS = {
    "causal": lambda n: BlockMask.causal(n(100), n(90), block_size=n(64)),
    "window": lambda n: BlockMask.local_window(
        n(100), n(90), window=n(3), block_size=n(64)
    ),
    "global and local": lambda n: BlockMask.global_local(
        n(100), n(90), global_tokens=n(5), window=n(3), block_size=n(64)
    ),
    "dilated": lambda n: BlockMask.dilated(
        n(100), n(90), rates=(n(1), n(2)), block_size=n(16)
    ),
    "strided": lambda n: BlockMask.strided(
        n(100), n(90), stride=n(2), block_size=n(16)
    ),
    "function": lambda n: BlockMask.from_mask_fn(
        lambda b, h, q, k: q >= k, n(100), n(90), block_size=n(64)
    ),
    "dense": lambda n: BlockMask.from_dense(
        np.tri(100, 90, dtype=bool), block_size=n(64)
    ),
    "document": lambda n: BlockMask.document(np.arange(100) // 9, block_size=n(64)),
    "blocks": lambda n: BlockMask.from_blocks(
        np.tri(2, dtype=bool), seq_q=n(100), seq_kv=n(90), block_size=n(64)
    ),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32])
@pytest.mark.parametrize("name", MAKERS)
def test_sizes_of_any_integer(name, dtype):
    """Unsigned sizes cannot be negated, and products of narrow ones overflow."""
    got, expected = MAKERS[name](dtype), MAKERS[name](int)
    np.testing.assert_array_equal(got.to_dense(), expected.to_dense())
