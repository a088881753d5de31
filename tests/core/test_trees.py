"""Our own pytrees: equality, hashes, pickles, abstract ones, and `jax.export`."""

import pickle

import jax
import jax.numpy as jnp
import pytest
from helpers import normal
from jax import export

from jaxkern import pack_2_4, pack_mask, unpack_2_4, unpack_mask

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


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.usefixtures("unchecked_types")
def test_exported(name):
    pack, unpack = PACKED[name]
    program = export.export(jax.jit(unpack))(pack(X)).serialize()
    got = export.deserialize(program).call(pack(X))
    assert (got == unpack(pack(X))).all()
