"""Which tiles a block of the attention kernels takes, on the host and in a program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import attention_args
from helpers import mesh, value_and_vjp

from jaxkern import BlockMask
from jaxkern._attention.block_mask.runs import BlockLists, KnownLists
from jaxkern._attention.hopper.attend import attend
from jaxkern._attention.hopper.schedule import assign, make_schedule
from jaxkern._core import device

BF16 = jnp.bfloat16


def random_blocks(seed, shape, density):
    return np.random.default_rng(seed).random(shape) < density


MASKS = {
    "causal": lambda n: BlockMask.causal(n, n),
    "window": lambda n: BlockMask.local_window(n, n, window=40),
    "half": lambda n: BlockMask.from_blocks(random_blocks(0, (4, n // 128, 8), 0.5)),
    "of each batch": lambda n: BlockMask.from_blocks(
        random_blocks(1, (2, 4, n // 128, 8), 0.1)
    ),
    "documents": lambda n: (
        BlockMask.document(np.arange(n) // 200) & BlockMask.causal(n, n)
    ),
    "none": lambda n: BlockMask.from_blocks(np.zeros((n // 128, 8), bool)),
}


@pytest.mark.parametrize(
    "name, blocks, heads, lane_rows",
    [(name, 3, 1, (2, 64)) for name in MASKS] + [("of each batch", 20, 2, (1, 128))],
)
def test_host_and_program_agree(name, blocks, heads, lane_rows, monkeypatch):
    monkeypatch.setattr(device, "multiprocessors", lambda: blocks)
    mask = MASKS[name](1024)

    def schedule(lists):
        shape = 4, 4 // heads, 1024
        return make_schedule(lists, shape, heads, lane_rows, 128, 16e6)

    for lists in [(mask.kv, mask.full_kv), (mask.q, mask.full_q)]:
        host, program = schedule(lists), jax.jit(schedule)(lists)
        for a, b in zip(*map(jax.tree.leaves, (host, program)), strict=True):
            assert isinstance(a, np.ndarray) and a.dtype == b.dtype == np.int32
            np.testing.assert_array_equal(a, b)


def sorts(fn, *args):
    """Count the sorts in the program for a GPU; one that schedules has some."""
    lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("stablehlo.sort")


AROUND = {"nothing": lambda fn: fn, "checkpoint": jax.checkpoint, "vmap": jax.vmap}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_a_known_mask_is_scheduled_on_the_host(around):
    args, cotangents = attention_args((2, 256, 256, 2, 1, 16, 16), BF16)
    if around is jax.vmap:
        args, cotangents = jax.tree.map(lambda x: x[None], (args, cotangents))
    mask = BlockMask.causal(256, 256)

    def both_passes(args, cotangents):
        run = around(partial(attend, mask=mask, scale=0.25))
        return value_and_vjp(run, args, cotangents)

    assert sorts(both_passes, args, cotangents) == 0


def test_a_traced_mask_is_scheduled_in_the_program():
    args, _ = attention_args((2, 256, 256, 2, 1, 16, 16), BF16)

    def forward(mask, *args):
        return attend(*args, mask=mask, scale=0.25)

    assert sorts(forward, BlockMask.causal(256, 256), *args) > 0


def test_lists_in_arrays_are_known_too():
    args, _ = attention_args((1, 256, 256, 1, 1, 16, 16), BF16)
    mask = jax.tree.map(jnp.asarray, BlockMask.causal(256, 256))
    assert sorts(partial(attend, mask=mask, scale=0.25), *args) == 0


def test_in_scan_and_shard_map_a_mask_stays_known():
    args, _ = attention_args((2, 256, 256, 1, 1, 16, 16), BF16)
    mask = BlockMask.causal(256, 256)

    def loss(query, key, value):
        def layer(query, _):
            return attend(query, key, value, mask=mask, scale=0.25)[0], None

        query, _ = jax.lax.scan(layer, query, None, length=2)
        return jax.lax.psum(query.astype(jnp.float32).sum(), "i")

    specs = (jax.P("i"),) * 3
    sharded = jax.shard_map(loss, mesh=mesh(i=1), in_specs=specs, out_specs=jax.P())
    assert sorts(jax.grad(sharded, argnums=(0, 1, 2)), *args) == 0


def test_known_lists_are_equal_by_value():
    lists = BlockMask.causal(256, 256).kv
    known, copy = KnownLists(*lists.arrays), KnownLists(*(x + 0 for x in lists.arrays))
    assert known == copy and hash(known) == hash(copy)
    assert known != KnownLists(*(x + 1 for x in lists.arrays)) and known != lists
    assert not jax.tree.leaves(known)


def test_every_tile_is_taken_once(monkeypatch):
    monkeypatch.setattr(device, "multiprocessors", lambda: 3)
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (1, 4, 40)).astype(np.int32)
    starts = np.cumsum(counts, -1, dtype=np.int32) - counts
    lists = BlockLists(counts, starts, np.zeros((1, 4, 2000), np.int32))
    empty = BlockLists(0 * counts, starts, np.zeros((1, 4, 1), np.int32))
    schedule = make_schedule((empty, lists), (2, 4, 40 * 128), 1, (1, 128), 128, 1e6)
    b, h, t = place = np.asarray(schedule.place).T
    assert sorted(zip(*place, strict=True)) == sorted(np.ndindex(2, 4, 40))
    rows = np.asarray(schedule.rows)[:, 0, 0]
    np.testing.assert_array_equal(rows[:, 2], counts[0, h, t])
    np.testing.assert_array_equal(rows[:, 3], 2000 * h + starts[0, h, t])
    assert not rows[:, 0].any()
    blocks = np.asarray(schedule.blocks)
    assert blocks[0, 0] == 0 and blocks[:, 1].sum() == 320
    np.testing.assert_array_equal(blocks[1:, 0], blocks[:-1].sum(1))


@pytest.mark.parametrize(
    "lengths, limit",
    [
        (np.full(2048, 10), 16 * 10),
        (np.tile(np.arange(128), 16), 1.02 * 127 * 8 * 128 / 132),
        (np.where(np.arange(2048) % 128, 10, 128), 1.07 * (2032 * 10 + 2048) / 132),
        (np.arange(300), 550),
        (np.array([5, 3, 1]), 5),
        (np.zeros(500), 0),
    ],
    ids=["equal", "causal", "a few long ones", "few", "fewer than blocks", "none"],
)
def test_every_block_has_about_as_much(lengths, limit):
    count = min(132, len(lengths))
    falling = -np.sort(-lengths)
    block = assign(falling, count)
    assert np.bincount(block, falling).max() <= limit


def test_what_is_walked_together_stays_in_l2(monkeypatch):
    monkeypatch.setattr(device, "multiprocessors", lambda: 3)
    mask = BlockMask.causal(1024, 1024)
    schedule = make_schedule(
        (mask.kv, mask.full_kv), (1, 8, 1024), 1, (1, 128), 128, 16e6
    )
    for first, count in schedule.blocks:
        heads = np.asarray(schedule.place)[first : first + count, 1]
        assert (np.diff(heads // 2) >= 0).all()
