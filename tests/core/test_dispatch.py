"""Which implementation runs an op: by name, reason, speed and placement of arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh

from jaxkern._core import device
from jaxkern._core.dispatch import check_implementation, choose
from jaxkern._core.sharding import lie_whole

X = jnp.ones((8, 4))
NO_HOPPER = "op: mosaic_gpu needs an H100 or H200, but the default device is cpu"


def nothing():
    return None


def a_reason():
    return "dim must be even, got 3"


def must_not_be_asked():
    raise AssertionError


@pytest.mark.usefixtures("chooses_hopper")
def test_a_named_implementation_runs():
    assert choose("op", "xla", [X], must_not_be_asked) == "xla"
    spread = jax.device_put(X, jax.NamedSharding(mesh(i=8), jax.P("i")))
    for x, faster in [(X, True), (X, False), (spread, True)]:
        assert choose("op", "mosaic_gpu", [x], nothing, faster) == "mosaic_gpu"


@pytest.mark.usefixtures("chooses_hopper")
def test_a_named_kernel_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match="^op: dim must be even, got 3$"):
        choose("op", "mosaic_gpu", [X], a_reason)
    message = "op: arrays must not lie on explicit mesh axes .*, got 'i'; .*shard_map"
    for size in (1, 8):
        explicit = jax.NamedSharding(mesh("explicit", i=size), jax.P("i"))
        x = jax.device_put(X, explicit)
        for run in (lambda f: f, jax.jit):
            with pytest.raises(NotImplementedError, match=message):
                run(lambda x: choose("op", "mosaic_gpu", [x], nothing))(x)
        assert choose("op", None, [X, x], nothing) == "xla"


@pytest.mark.usefixtures("chooses_hopper")
def test_none_is_xla_for_arrays_that_lie_elsewhere(monkeypatch):
    """These are arrays on the CPU of a machine with a GPU."""
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    assert choose("op", None, [X], nothing) == "xla"
    said = []
    jax.jit(lambda x: said.append(choose("op", None, [x], nothing)))(X)
    assert said == ["mosaic_gpu"]


def test_the_default_device_is_that_of_jax():
    assert device.default() == jax.devices()[0]
    with jax.default_device(jax.devices()[3]):
        assert device.default() == jax.devices()[3]
    with jax.default_device("cpu"):
        assert device.default() == jax.devices("cpu")[0]


def test_a_named_kernel_names_the_device_that_it_found():
    with pytest.raises(NotImplementedError, match=f"^{NO_HOPPER}$"):
        choose("op", "mosaic_gpu", [X], nothing)
    # The device comes before other reasons: without it, no arguments would help.
    with pytest.raises(NotImplementedError, match=f"^{NO_HOPPER}$"):
        choose("op", "mosaic_gpu", [X], a_reason)


@pytest.mark.usefixtures("chooses_hopper")
def test_none_picks_the_kernel_where_it_runs_and_is_faster():
    assert choose("op", None, [X], nothing) == "mosaic_gpu"
    assert choose("op", None, [X], a_reason) == "xla"
    assert choose("op", None, [X], must_not_be_asked, faster=False) == "xla"
    spread = jax.device_put(X, jax.NamedSharding(mesh(i=8), jax.P("i")))
    assert choose("op", None, [X, spread], must_not_be_asked) == "xla"


def test_none_is_xla_without_a_hopper():
    assert choose("op", None, [X], must_not_be_asked) == "xla"


def test_unknown_names_are_refused():
    for name in (None, "xla", "mosaic_gpu"):
        check_implementation("op", name)
    with pytest.raises(
        ValueError, match="op: implementation must be one of None, 'xla', .* 'triton'"
    ):
        check_implementation("op", "triton")


def spread_over(kind, spec=("i",)):
    return jax.device_put(X, jax.NamedSharding(mesh(kind, i=8), jax.P(*spec)))


PLACES = {
    "one device": lambda: (X, True),
    "another device": lambda: (jax.device_put(X, jax.devices()[3]), True),
    "automatic axes": lambda: (spread_over("auto"), False),
    "explicit axes": lambda: (spread_over("explicit"), False),
    "copies": lambda: (spread_over("auto", ()), False),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_arrays_lie_whole_in_every_transformation(place):
    x, expected = place()
    said = []

    def note(x):
        said.append(lie_whole(x))
        return 2 * x

    note(x)
    jax.jit(note)(x)
    jax.vjp(note, x)
    jax.jit(lambda x: jax.vjp(note, x)[1](x))(x)
    jax.jit(jax.vmap(note, in_axes=1))(x)
    assert said == [expected] * 5


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("size", [1, 8])
def test_in_a_mesh_that_is_set(kind, size):
    said = []

    def note(x):
        said.append(lie_whole(x))
        return x.sum()

    with jax.set_mesh(mesh(kind, i=size)):
        x = jnp.ones((8, 4))
        note(x)
        jax.jit(note)(x)
    # Pallas references carry no sharding, so a kernel cannot take explicit axes.
    assert said == [kind == "auto" and size == 1] * 2


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_inside_shard_map_each_device_has_its_part_whole(kind):
    said = []

    def note(x):
        said.append(lie_whole(x))
        return x

    devices = mesh(kind, data=2, ring=4)
    spec = jax.P("ring")
    split = partial(jax.shard_map, note, mesh=devices, in_specs=spec, out_specs=spec)
    x = jax.device_put(X, jax.NamedSharding(devices, spec))
    for run in (split(), split(axis_names={"ring"})):
        jax.jit(run)(x)
    assert said == [True, False]
