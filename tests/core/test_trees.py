"""Equality, hashes, pickles and exports of the library's pytrees."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax import export

from jaxkern import BlockMask, pack_2_4, pack_mask, unpack_2_4, unpack_mask

X, OTHER = normal(0, (4, 8)), normal(1, (4, 8))
PACKED = {"Packed24": (pack_2_4, unpack_2_4), "PackedMask": (pack_mask, unpack_mask)}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", PACKED)
def test_equal_by_value(name):
    pack, unpack = PACKED[name]
    one, same, other = pack(X), pack(jnp.array(X)), pack(OTHER)
    assert one == same and hash(one) == hash(same)
    assert one != other and one != X and one != pack(X[:2])
    assert pickle.loads(pickle.dumps(one)) == one
    assert jax.tree.map(lambda a, b: a, one, same) == one
    abstract = jax.eval_shape(pack, X)
    assert abstract == jax.eval_shape(pack, OTHER) and abstract != one
    assert len({one: 0, same: 1, abstract: 2}) == 2
    said = []

    def compare(a, b):
        said.extend([a == a, a == b, hash(a) == hash(b)])
        return unpack(a)

    jax.eval_shape(compare, one, same)
    assert said == [True, False, True]


def block_masks(seed):
    """Return a mask of each kind, with other contents for another seed."""
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, 8)))
    return {
        "causal": BlockMask.causal(8, 8 + seed, block_size=4),
        "document": BlockMask.document(ids, block_size=4),
        # A tuple in the tuple of its static fields.
        "dilated": BlockMask.dilated(8, 8 + seed, rates=(1, 2), block_size=4),
        "dense": BlockMask.from_dense(rng.random((8, 8)) < 0.5, block_size=4),
        "both": BlockMask.causal(8, 8, block_size=4)
        & BlockMask.document(ids, block_size=4),
    }


@pytest.mark.parametrize("name", block_masks(0))
def test_block_masks_are_equal_by_value(name):
    one, same, other = (block_masks(seed)[name] for seed in (0, 0, 1))
    restored = pickle.loads(pickle.dumps(one))
    assert one == same == restored and len({one, same, restored}) == 1
    assert one != other and one != name
    assert jax.tree.map(lambda a, b: a, one, same) == one
    run: Any = jax.jit(lambda mask: mask.to_dense())
    for mask in (one, same, restored):
        run(mask)
    assert run._cache_size() == 1


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.usefixtures("unchecked_types")
def test_exported(name):
    pack, unpack = PACKED[name]
    program = export.export(jax.jit(unpack))(pack(X)).serialize()
    got = export.deserialize(program).call(pack(X))
    assert (got == unpack(pack(X))).all()


@pytest.mark.parametrize("name", block_masks(0))
def test_a_block_mask_is_exported_as_an_argument(name):
    run = jax.jit(lambda mask: mask.to_dense())
    mask = block_masks(0)[name]
    got = export.deserialize(export.export(run)(mask).serialize()).call(mask)
    assert (got == mask.to_dense()).all()


def test_a_function_in_a_mask_cannot_be_exported_as_an_argument():
    mask = BlockMask.from_mask_fn(lambda b, h, q, k: q >= k, 8, 8, block_size=4)
    exported = export.export(jax.jit(lambda mask: mask.to_dense()))(mask)
    with pytest.raises(TypeError, match="Python function, got .*from_dense"):
        exported.serialize()
    # The advice of the error works.
    test = BlockMask.from_dense(np.asarray(mask.to_dense())[0, 0], block_size=4)
    assert (test.to_dense() == mask.to_dense()).all()
    export.export(jax.jit(lambda mask: mask.to_dense()))(test).serialize()
