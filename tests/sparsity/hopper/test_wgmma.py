"""2:4 in registers: the threads' code, run in NumPy, and the emulator's meaning."""

import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import to_float64

from jaxkern import pack_2_4
from jaxkern._sparsity.hopper import wgmma
from jaxkern._sparsity.hopper.wgmma import FIRST_TWO, indices_of, words_of
from jaxkern.testing.emulator import meanings

THREADS = np.arange(128, dtype=np.uint32)


class Threads:
    """The dialect `arith`, as if 128 threads were the entries of an array."""

    CmpIPredicate = types.SimpleNamespace(ult=np.less, ne=np.not_equal)
    andi, ori, xori = np.bitwise_and, np.bitwise_or, np.bitwise_xor
    maxui, minui, select = np.maximum, np.minimum, staticmethod(np.where)
    shli, shrui = np.left_shift, np.right_shift
    addf, subf, mulf = np.add, np.subtract, np.multiply

    @staticmethod
    def cmpi(predicate, a, b):
        return predicate(a, b)

    @staticmethod
    def constant(kind, value):
        return np.full(128, value, np.float32)


def to_float(bits, dtype):
    return bits.astype(np.uint16).view(dtype).astype(np.float32)


def pack(pair, dtype):
    low, high = (x.astype(dtype).view(np.uint16).astype(np.uint32) for x in pair)
    return low | high << np.uint32(16)


@pytest.fixture
def threads(monkeypatch):
    """Run the code for a thread's registers on NumPy arrays of all threads."""
    f32 = types.SimpleNamespace(get=lambda: None)
    replaced = {
        "arith": Threads,
        "ir": types.SimpleNamespace(F32Type=f32),
        "_i32": lambda x: np.full(128, x & 0xFFFFFFFF, np.uint32),
        "_thread": lambda: THREADS,
        "mgpu": types.SimpleNamespace(shfl_bfly=lambda x, d: x[THREADS ^ np.uint32(d)]),
        "_to_float": lambda key, dtype: to_float(key >> np.uint32(2), dtype),
        "_pack": pack,
        "_unpack": lambda register, dtype: [
            to_float(register >> np.uint32(16 * i), dtype) for i in range(2)
        ],
    }
    for name, value in replaced.items():
        monkeypatch.setattr(wgmma, name, value)


def in_registers(x):
    """Return what each thread holds of wgmma's sums, two neighbours in a register.

    There is a list for row r and one for row r + 8, with a register for each 8 columns.
    """
    bits = np.asarray(x).view(np.uint16).astype(np.uint32)
    warp, row, column = THREADS // 32, THREADS % 32 // 4, 2 * (THREADS % 4)
    return [
        [
            bits[16 * warp + row + 8 * half, 8 * block + column]
            | bits[16 * warp + row + 8 * half, 8 * block + column + 1] << np.uint32(16)
            for block in range(8)
        ]
        for half in range(2)
    ]


def select_by_threads(x, shrink):
    """Return what `select` does, put together from the registers of all threads."""
    warp, row, quad = THREADS // 32, THREADS % 32 // 4, THREADS % 4
    values = np.zeros((64, 32), np.uint16)
    words, sums = np.zeros(128, np.uint32), np.zeros((64, 8), np.float32)
    rows = wgmma._transpose_in_quad(in_registers(x))
    for half, pairs in enumerate(rows):
        found = wgmma._select_chunk(pairs, x.dtype, shrink)
        at = 16 * warp + row + 8 * half
        for i, register in enumerate(found[0]):
            values[at, 8 * quad + 2 * i] = register & np.uint32(0xFFFF)
            values[at, 8 * quad + 2 * i + 1] = register >> np.uint32(16)
        words |= found[1] << np.uint32(16 * half)
        for i, total in enumerate(found[2]):
            sums[at, 2 * quad + i] = total
    return values.view(x.dtype), words.view(np.int32), sums


def numbers(seed, dtype, extremes=True):
    """Draw numbers from 0 on with many ties and zeros; some are not finite."""
    finite = np.arange(9) / 4
    rare = [np.nan, np.inf, float(jnp.finfo(dtype).max)] if extremes else []
    drawn = np.random.default_rng(seed).choice([*finite, *finite, *rare], (64, 64))
    return drawn.astype(dtype)


def assert_equal(got, expected):
    """Assert equality to the bit, where all NaNs are equal."""
    for a, b in zip(to_float64(got), to_float64(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shrink", [False, True], ids=["top2", "soft"])
def test_threads_select_what_the_emulator_takes_them_for(dtype, shrink):
    for seed in range(8):
        x = numbers(seed, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            values, words, sums = select_by_threads(x, shrink)
        expected = meanings.selected(jnp.asarray(x), shrink=shrink)
        assert_equal((values, words), expected[:2])
        if shrink:
            # Sums of the largest numbers are rounded, in another order.
            np.testing.assert_allclose(sums, expected[2], rtol=1e-6)


def test_the_emulator_selects_as_pack_2_4_does():
    for seed in range(4):
        x = jnp.asarray(numbers(seed, jnp.bfloat16))
        values, words = meanings.selected(x, shrink=False)
        packed = pack_2_4(x)
        assert_equal([values], [packed.values])
        of_both = words_of(packed.indices, 128)[0]
        np.testing.assert_array_equal(words, of_both[0])
        np.testing.assert_array_equal(of_both[1], FIRST_TWO)


def test_soft_sums_are_those_of_s_ste():
    x = jnp.asarray(numbers(0, jnp.bfloat16, extremes=False))
    shrunk, words, sums = meanings.selected(x, shrink=True)
    wide = np.asarray(x, np.float64)
    dense = np.asarray(meanings.dense(shrunk, words[None]), np.float64)
    sums = np.asarray(sums, np.float64).reshape(64, 4, 2).sum(1)
    np.testing.assert_allclose(sums[:, 0], (wide * dense).sum(1), rtol=1e-6)
    np.testing.assert_allclose(sums[:, 1], (dense * dense).sum(1), rtol=1e-6)


def test_every_pattern_of_a_group_goes_there_and_back():
    """Each group of each thread's word has all six pairs of positions."""
    pairs = list(itertools.combinations(range(4), 2))
    x = np.zeros((64, 128), np.float32)
    for row in range(64):
        for group in range(32):
            here = pairs[(row + group) % 6]
            x[row, [4 * group + i for i in here]] = 1 + np.arange(2)
    packed = pack_2_4(jnp.asarray(x, jnp.bfloat16))
    words = words_of(packed.indices, 128)
    assert words.shape == (2, 2, 128)
    np.testing.assert_array_equal(indices_of(words)[:64], packed.indices)
    dense = meanings.dense(packed.values, words[0])
    np.testing.assert_array_equal(np.asarray(dense, np.float32), x)


def test_words_lie_as_the_tensor_cores_take_them():
    """The metadata of a sparse instruction, 64 x 32, has this layout.

    Bits 2 n and 2 n + 1 of the word of lane t in warp w are position n of row
    16 w + t / 4 for n < 8, and position n - 8 of the row 8 below for the other n. t % 2
    selects 16 of the 32 columns, and t / 2 % 2 the instruction.
    """
    indices = np.random.default_rng(0).integers(0, 256, (64, 8), np.uint8)
    words = np.asarray(words_of(jnp.asarray(indices), 128))[0, 0].view(np.uint32)
    positions = (indices[..., None] >> (2 * np.arange(4))) % 4
    positions = positions.reshape(64, 2, 2, 8)
    for thread in range(128):
        instruction, part = thread % 4 // 2, thread % 2
        for half in range(2):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * half
            expected = positions[row, instruction, part]
            got = words[thread] >> (16 * half + 2 * np.arange(8)) & 3
            np.testing.assert_array_equal(got, expected)
