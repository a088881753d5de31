"""`matmul_2_4` on sparse tensor cores, in an emulator that detects races."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_as_close, mesh, normal, to_float64, value_and_vjp

from jaxkern import Packed24, matmul_2_4, pack_2_4, unpack_2_4
from jaxkern._sparsity import matmul
from jaxkern._sparsity.hopper import product
from jaxkern.testing.compiler import lower

BF16, F16 = jnp.bfloat16, jnp.float16
kernel = partial(matmul_2_4, implementation="mosaic_gpu")
emulated = pytest.mark.usefixtures("hopper")
lowered = pytest.mark.usefixtures("chooses_hopper")


def make(size, dtype) -> Any:
    """Return a packed matrix, w and a cotangent; size is (rows, features, d_out)."""
    rows, features, d_out = size
    packed = pack_2_4(normal(0, (rows, features), dtype))
    return packed, normal(1, (features, d_out), dtype), normal(2, (rows, d_out), dtype)


def check(size, dtype, fn: Any = kernel):
    packed, w, g = make(size, dtype)

    def of_values(fn):
        def run(values, w):
            return fn(dataclasses.replace(packed, values=values), w)

        return run

    got = value_and_vjp(of_values(fn), (packed.values, w), g)
    plain = of_values(lambda packed, w: unpack_2_4(packed) @ w)
    bound = value_and_vjp(plain, (packed.values, w), g)
    dense, wide, g = to_float64((unpack_2_4(packed), w, g))
    d_dense = (g @ wide.T).reshape(-1)
    # The gradients of the values are those at the values' positions.
    places = unpack_2_4(dataclasses.replace(packed, values=packed.values * 0 + 1))
    indices = np.flatnonzero(to_float64(places))
    d_values = np.zeros(packed.values.shape)
    if len(indices) == d_values.size:
        d_values = d_dense[indices].reshape(d_values.shape)
        assert_as_close(got, bound, (dense @ wide, (d_values, dense.T @ g)))
    else:
        # A short group stores values past its end, whose gradients are not compared.
        _, (_, d_w) = got
        exact = dense @ wide, dense.T @ g
        assert_as_close((got[0], d_w), (bound[0], bound[1][1]), exact)


# (rows, features, d_out): several tiles and steps, less than one, multiples of none.
SIZES = [(200, 320, 136), (70, 128, 64), (3, 13, 5)]


@emulated
@pytest.mark.parametrize(
    "size, dtype", [*((size, BF16) for size in SIZES), (SIZES[1], F16)]
)
def test_values_and_gradients(size, dtype):
    check(size, dtype)


@emulated
@pytest.mark.parametrize("columns", [256, 128, 64])
def test_tiles(columns, monkeypatch):
    monkeypatch.setattr(product, "choose_columns", lambda *a: columns)
    check((200, 260, 264), BF16)


def check_positions(transposed):
    """Check all six pairs of positions in each group of each thread's word."""
    pairs = np.array(list(itertools.combinations(range(4), 2)))
    rng = np.random.default_rng(0)
    drawn = rng.permuted(np.tile(np.arange(6), (64, 64, 1)), axis=2)
    # The shape is (six, row, group, either); each feature has a value of its own.
    positions = pairs[np.moveaxis(drawn, 2, 0)]
    kept = (positions[..., None] == np.arange(4)).any(-2)
    x = kept.reshape(6 * 64, 256) * np.arange(1, 257)
    order = rng.permutation(256)
    w = jnp.eye(256, dtype=BF16)[:, order]
    packed = pack_2_4(jnp.asarray(x, BF16))
    got = product.product(
        packed.values, packed.indices, w.T if transposed else w, transposed
    )
    np.testing.assert_array_equal(to_float64(got), x[:, order])


right = pytest.mark.parametrize("transposed", [False, True], ids=["w", "transposed"])


@emulated
@right
def test_positions(transposed):
    check_positions(transposed)


def test_no_group_has_an_invalid_pair_of_positions(monkeypatch):
    """Not even a group past the end has one, for which hardware defines no result."""

    def handed(values, words, right):
        return words.reshape(-1, 128)

    monkeypatch.setattr(product, "sparse_matmul", lambda *a: handed)

    @jax.jit
    def words(x):
        packed, w = pack_2_4(x), jnp.zeros((x.shape[1], 128), x.dtype)
        return product.product(packed.values, packed.indices, w)

    # 1 to 140 features: rows with a short group are packed with zeros at the end.
    for columns in range(4, 141, 4):
        features = columns - np.arange(64)[:, None] % 4
        x = jnp.where(np.arange(columns) < features, normal(0, (64, columns)), 0)
        found = np.asarray(words(x.astype(BF16))).view(np.uint8)
        pairs = {*np.unique([found & 15, found >> 4])}
        assert pairs <= {0x4, 0x8, 0x9, 0xC, 0xD, 0xE}, f"{columns} features"


@emulated
def test_more_batch_axes_and_vmap():
    packed, w, _ = make((24, 40, 16), BF16)
    parts = packed.values.reshape(2, 12, -1), packed.indices.reshape(2, 12, -1)
    expected = to_float64(kernel(packed, w)).reshape(2, 12, 16)
    got = kernel(Packed24(*parts, 40), w)
    np.testing.assert_array_equal(to_float64(got), expected)
    mapped = jax.vmap(lambda v, i: kernel(Packed24(v, i, 40), w))(*parts)
    np.testing.assert_array_equal(to_float64(mapped), expected)


@emulated
def test_in_shard_map():
    """Rows are split and w is whole on each device; the emulator has one device."""
    specs = jax.P("i"), jax.P()
    check(
        SIZES[1],
        BF16,
        jax.shard_map(kernel, mesh=mesh(i=1), in_specs=specs, out_specs=jax.P("i")),
    )


def modules(fn, size):
    """Return the kernels of `fn(packed, w)`, lowered for a GPU."""
    packed, w, _ = make((1, *size[1:]), BF16)
    values, indices = packed.values, packed.indices
    rows = [jnp.resize(a, (size[0], a.shape[1])) for a in (values, indices)]
    return lower(lambda v, i, w: fn(Packed24(v, i, size[1]), w), (*rows, w))


@lowered
def test_none_picks_the_kernel_from_many_rows_on(monkeypatch):
    assert modules(matmul_2_4, (24, 40, 16)) == []
    assert len(modules(kernel, (24, 40, 16))) == 1
    monkeypatch.setattr(matmul, "LEAST_ROWS", 24)
    assert len(modules(matmul_2_4, (24, 40, 16))) == 1
    assert modules(matmul_2_4, (23, 40, 16)) == []


@lowered
@pytest.mark.parametrize("size", [(1, 1, 1), (2047, 8191, 130)])
def test_any_size_lowers_for_a_gpu(size):
    """Lowering checks more than the emulator does."""
    assert len(modules(kernel, size)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size, dtype",
    [*((size, BF16) for size in (*SIZES, (2000, 4100, 1000))), (SIZES[0], F16)],
)
def test_on_gpu(size, dtype):
    check(size, dtype)


@pytest.mark.gpu
@right
def test_positions_on_gpu(transposed):
    """The hardware orders positions among threads as its documents say."""
    check_positions(transposed)
