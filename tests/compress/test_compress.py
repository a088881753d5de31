"""`compress` on whole models: the new MLPs, what they change, and the report."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_definitions import (
    least_low_rank_error,
    optimal_brain_surgeon,
    output_error,
    silu,
    top2_rows,
)
from flax import nnx
from helpers import assert_near, normal, relative_error, to_float64

import jaxkern
from jaxkern import nn
from jaxkern.compress import compress

EMBED, HIDDEN, VOCAB, SEQ = 8, 16, 12, 6
RELU2: dict[str, Any] = {"gated_mlp": False, "activation": "relu2"}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (6, SEQ)))


def make(num_layers=1, **options):
    """Return a model that NumPy has drawn: JAX would compile the initializers."""

    def empty():
        return nn.TransformerLM(
            VOCAB,
            SEQ,
            embed_dim=EMBED,
            num_layers=num_layers,
            num_heads=2,
            hidden_dim=HIDDEN,
            rngs=nnx.Rngs(0),
            **options,
        )

    rng = np.random.default_rng(0)

    def draw(shape):
        scale = 0.5 if shape.ndim > 1 else 0.1
        values = (shape.ndim == 1) + scale * rng.standard_normal(shape.shape)
        return jnp.asarray(values.astype(np.float32).astype(shape.dtype))

    graph, state = nnx.split(nnx.eval_shape(empty))
    return nnx.merge(graph, jax.tree.map(draw, state))


def count(model):
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


class Recorder(nnx.Module):
    """Keeps the inputs of an MLP, outside of `jit`."""

    def __init__(self, mlp, found):
        self.mlp, self.keep = mlp, found.append

    def __call__(self, x):
        self.keep(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
        return self.mlp(x)


def inputs_of_the_mlp(model):
    """Return the inputs of the MLP of a model of one layer, in float64."""
    found = []
    view = nnx.clone(model)
    view.layers[0].mlp = Recorder(view.layers[0].mlp, found)
    view.features(TOKENS)
    return np.concatenate(found)


def unpacked(layer):
    return np.asarray(jaxkern.unpack_2_4(layer.weight).T, np.float64)


def weights_of(mlp):
    """Return the weights of a `LowRankSwiGLU` or a `CompressedMLP` in float64."""
    found = {}
    for name in ("gate", "up", "down"):
        chain = getattr(mlp, name)
        if isinstance(chain, nn.LowRankLinear):
            found[name] = np.linalg.multi_dot(
                [np.eye(chain.in_features), *to_float64(chain.weight)]
            )
        elif len(chain):
            arrays = [unpacked(layer) for layer in chain]
            found[name] = arrays[0] if len(arrays) == 1 else arrays[0] @ arrays[1]
    return found


METHODS: dict[str, dict[str, Any]] = {
    "svd_llm": {"method": "svd_llm", "rank": 3},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "both": {"method": ("svd_llm", "sparsegpt"), "rank": 4, "transposable": True},
}


@pytest.mark.parametrize("name", METHODS)
def test_weights_outputs_and_report(name):
    """The inputs of each weight are those of its own products on all batches."""
    model = make(scan_layers=False)
    x = inputs_of_the_mlp(model)
    mlp = model.layers[0].mlp
    old = to_float64(
        {"gate": mlp.w_gate[...], "up": mlp.w_up[...], "down": mlp.w_down[...]}
    )
    hidden = silu(x @ old["gate"]) * (x @ old["up"])
    inputs = {"gate": x, "up": x, "down": hidden}
    options = METHODS[name]
    small, report = compress(model, calibration=TOKENS, batch_size=4, **options)
    (line,) = report.layers
    new_mlp = small.layers[0].mlp
    new = weights_of(new_mlp)
    for key, w in old.items():
        rank = options.get("rank")
        if name == "svd_llm":
            least = least_low_rank_error(inputs[key], w, rank)
            assert output_error(inputs[key], w, new[key]) <= 1.001 * least
        if name == "wanda":
            norms = np.linalg.norm(inputs[key], axis=0)
            mask = top2_rows(np.abs(w) * norms[:, None])
            assert relative_error(new[key], mask * w) < 1e-6
        if name == "sparsegpt":
            moment = inputs[key].T @ inputs[key]
            expected = optimal_brain_surgeon(w, moment, top2_rows)
            assert relative_error(new[key], expected) < 1e-3
        error = np.linalg.norm(w - new[key]) / np.linalg.norm(w)
        assert line.weight_errors[key] == pytest.approx(error, rel=1e-4)
    y = hidden @ old["down"]
    other = silu(x @ new["gate"]) * (x @ new["up"]) @ new["down"]
    error = np.linalg.norm(y - other) / np.linalg.norm(y)
    assert line.output_error == pytest.approx(error, rel=1e-3)
    assert_near(new_mlp(jnp.asarray(x, jnp.float32)), other, 1e-4)
    # 3 weights of 8 x 16, or 3 pairs of rank r.
    counts = {"svd_llm": 216, "both": 144}
    assert line.parameters == counts.get(name, 192)
    assert line.flops == 2 * line.parameters
    assert (line.parameters_before, line.flops_before) == (384, 768)
    assert report.parameters_before - report.parameters == 384 - line.parameters
    assert {*line.ranks.values()} == {r for r in [options.get("rank")] if r}
    assert str(report).splitlines()[1].split()[:2] == ["0", line.mlp]


def test_packed_weights_learn_and_stay_transposable():
    small, _ = compress(make(), method="magnitude", transposable=True)
    mlp = small.layers[0].mlp
    layer = mlp.up[0]
    before = unpacked(layer)
    gradients = nnx.grad(lambda mlp: mlp(normal(0, (5, EMBED))).sum())(mlp)
    layer.values.set_value(layer.values[...] - gradients["up"][0]["values"][...])
    after = unpacked(layer)
    np.testing.assert_array_equal(before != 0, after != 0)
    assert (before != after).sum() == before.size / 2
    for w in (after, after.T):
        assert ((w.reshape(-1, 4, w.shape[1]) != 0).sum(1) == 2).all()


def test_activations_of_squared_relu():
    model = make(**RELU2, mlp_bias=True, scan_layers=False)
    mlp = model.layers[0].mlp
    mlp.b_up.set_value(normal(1, (HIDDEN,)))
    mlp.b_down.set_value(normal(2, (EMBED,)))
    small, report = compress(model, method="activations", calibration=TOKENS)
    x = inputs_of_the_mlp(model)
    w_up, w_down, b_up, b_down = to_float64(
        (mlp.w_up[...], mlp.w_down[...], mlp.b_up[...], mlp.b_down[...])
    )
    hidden = np.maximum(x @ w_up + b_up, 0) ** 2
    kept = (hidden.T * top2_rows(hidden.T)).T
    y, other = hidden @ w_down + b_down, kept @ w_down + b_down
    assert_near(small.layers[0].mlp(jnp.asarray(x, jnp.float32)), other)
    (line,) = report.layers
    error = np.linalg.norm(y - other) / np.linalg.norm(y)
    assert line.output_error == pytest.approx(error, rel=1e-4) and error > 0
    assert [*line.weight_errors.values()] == [0, 0]
    assert (line.flops_before, line.flops) == (512, 384)


def test_a_size_is_met_and_other_layers_stay():
    model = make(num_layers=3, remat=True)
    given = jax.tree.leaves(nnx.state(model))
    target = count(model) - 300
    small, report = compress(
        model,
        method="svd_llm",
        target_parameters=target,
        calibration=TOKENS,
        layers=[2, 0],
        batch_size=3,
    )
    assert [line.layer for line in report.layers] == [0, 2]
    # One more rank of gate and up has 48 parameters, and one of down 24.
    assert target - 24 < report.parameters <= target
    assert report.parameters == count(small)
    kinds = [type(layer.mlp).__name__ for layer in small.layers]
    assert kinds == ["LowRankSwiGLU", "SwiGLU", "LowRankSwiGLU"]
    ranks = [line.ranks for line in report.layers]
    assert all(rank["gate"] == rank["up"] for rank in ranks)
    # The given model is as it was, and what is not compressed equals it.
    assert model.scan_layers
    for a, b in zip(jax.tree.leaves(nnx.state(model)), given, strict=True):
        np.testing.assert_array_equal(a, b)
    for one, other in ((small.layers[1], 1), (small.layers[0].attention, 0)):
        theirs = model.layers if one is small.layers[1] else model.layers.attention
        theirs = jax.tree.map(lambda a, i=other: a[i], theirs)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)
    axes = small.layers[1].mlp.w_up.get_metadata()["out_sharding"]
    assert axes == ("embed", "mlp")
    assert small.generate(TOKENS[:, :2], max_new_tokens=1).shape == (6, 3)


def test_other_mlps_keep_their_kind():
    """A low-rank MLP becomes 2:4, its second factors by what the first have become."""
    model = make(mlp=partial(nn.LowRankReLU2, rank=(3, 4)), scan_layers=False)
    x = inputs_of_the_mlp(model)
    small, report = compress(model, method="wanda", calibration=TOKENS)
    (line,) = report.layers
    assert (line.mlp, line.ranks) == ("CompressedMLP", {"up": 3, "down": 4})
    factors = to_float64(model.layers[0].mlp.up.weight)
    for w, layer in zip(factors, small.layers[0].mlp.up, strict=True):
        kept = top2_rows(np.abs(w) * np.linalg.norm(x, axis=0)[:, None]) * w
        assert relative_error(unpacked(layer), kept) < 1e-6
        x = x @ kept
    model = make(**RELU2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    small, report = compress(model, method="svd", energy=0.6)
    (line,) = report.layers
    assert line.mlp == "LowRankReLU2" and line.output_error is None
    new = small.layers[0].mlp
    assert new.up.w_in.dtype == jnp.bfloat16 and new.dtype == jnp.bfloat16
    w = np.asarray(model.layers.mlp.w_up[0], np.float64)
    values = np.linalg.svd(w, compute_uv=False) ** 2
    kept = np.cumsum(values) / values.sum()
    assert line.ranks["up"] == 1 + np.searchsorted(kept, 0.6)
    sparse, report = compress(small, method="activations")
    assert report.layers[0].mlp == "LowRankReLU2"
    assert sparse.layers[0].mlp.sparsity == "2:4"


def test_reported_errors_are_free_of_scale():
    """Squares of such outputs and weights are 0 or infinite in float32."""
    model = make(**RELU2)
    down = model.layers.mlp.w_down
    given, reports = down[...], []
    for scale in (1.0, 1e-22, 1e20):
        down.set_value(given * scale)
        _, report = compress(model, method="wanda", calibration=TOKENS)
        (line,) = report.layers
        reports.append([line.output_error, *line.weight_errors.values()])
    for scaled in reports[1:]:
        assert scaled == pytest.approx(reports[0], rel=1e-4)


class Doubled(nn.SwiGLU):
    def __call__(self, x):
        return 2 * super().__call__(x)


def nothing(model):
    return model


def with_nan(model):
    mlp = model.layers.mlp
    mlp.w_up.set_value(mlp.w_up[...].at[0, 0, 0].set(jnp.nan))
    return model


def with_infinite_inputs(model):
    model.embedding.set_value(model.embedding[...] * jnp.inf)
    return model


GELU: dict[str, Any] = {"gated_mlp": False, "activation": "gelu"}
SPARSE: dict[str, Any] = {"mlp": partial(nn.LowRankReLU2, rank=3, sparsity="2:4")}
SOFT: dict[str, Any] = {"mlp": partial(nn.LowRankReLU2, rank=3, sparsity="2:4-soft")}
REFUSED: list[tuple[dict[str, Any], Any, dict[str, Any], type[Exception], str]] = [
    ({}, lambda m: m.layers, {}, TypeError, "model must be a TransformerLM, got Trans"),
    (
        {"mlp": Doubled},
        nothing,
        {},
        TypeError,
        "the mlp of layer 0 must be one of SwiG",
    ),
    (
        {},
        nothing,
        {"method": "sparse"},
        ValueError,
        "method must be one of 'svd', 'svd",
    ),
    ({}, nothing, {"method": ("wanda", "svd")}, ValueError, "method must be one of"),
    ({}, nothing, {"rank": None}, ValueError, "one of rank, energy and target_para"),
    ({}, nothing, {"energy": 0.5}, ValueError, "'svd', got rank and energy"),
    ({}, nothing, {"rank": 0}, ValueError, "rank must be an integer of at least 1"),
    ({}, nothing, {"rank": 6}, ValueError, "rank must be below d_in d_out .* = 5.3"),
    (
        {},
        nothing,
        {"rank": None, "energy": 2.0},
        ValueError,
        "energy must be at most 1, got 2",
    ),
    (
        {},
        nothing,
        {"rank": None, "target_parameters": 9},
        ValueError,
        "target_parameters must be from 544 to 832, .* got 9",
    ),
    ({}, nothing, {"method": "magnitude"}, ValueError, "rank must be None for 'magn"),
    ({}, nothing, {"transposable": True}, ValueError, "transposable must be False for"),
    ({}, nothing, {"transposable": 1}, TypeError, "transposable must be True or False"),
    (
        {},
        nothing,
        {"method": ("svd", "magnitude"), "transposable": True},
        ValueError,
        "sizes must be multiples of 4 with transposable, got 8 by 2 by 16 for gate",
    ),
    ({}, nothing, {"method": "svd_llm"}, ValueError, "calibration must be tokens for"),
    (
        {},
        nothing,
        {"calibration": jnp.ones((1, 2))},
        TypeError,
        "calibration must be an",
    ),
    (
        {},
        nothing,
        {"calibration": jnp.full((1, 2), VOCAB)},
        ValueError,
        "calibration must be from 0 to 11, got 12",
    ),
    (
        {},
        nothing,
        {"calibration": jnp.zeros((1, 7), int)},
        ValueError,
        "calibration must be sequences of 1 to 6 tokens, got shape .1, 7.",
    ),
    ({}, nothing, {"batch_size": 0}, ValueError, "batch_size must be an integer"),
    ({}, nothing, {"layers": [1]}, ValueError, "layers must be integers from 0 to 0"),
    ({}, nothing, {"layers": [0, 0]}, ValueError, "layers must be different"),
    (
        {},
        with_nan,
        {},
        ValueError,
        "layer 0 must have finite weights, got NaN .* in up",
    ),
    (
        {},
        with_infinite_inputs,
        {"method": "wanda", "rank": None, "calibration": TOKENS},
        ValueError,
        "calibration must give finite inputs to the mlp of layer 0",
    ),
    (GELU, nothing, {"method": "activations", "rank": None}, ValueError, "got 'gelu'"),
    (SPARSE, nothing, {"method": "magnitude", "rank": None}, ValueError, "dense activ"),
    (SOFT, nothing, {}, ValueError, "sparsity None or '2:4', got '2:4-soft'"),
    (
        {},
        lambda m: compress(m, method="magnitude")[0],
        {},
        ValueError,
        "layer 0 must have no 2:4-sparse weights yet",
    ),
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("options, change, given, error, message", REFUSED)
def test_refusals(options, change, given, error, message):
    arguments: dict[str, Any] = {"method": "svd", "rank": 2} | given
    with pytest.raises(error, match=f"^compress: .*{message}"):
        compress(change(make(**options)), **arguments)
