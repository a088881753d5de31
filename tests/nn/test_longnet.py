"""`LongNet` beside a definition of its own, of which torchscale's models are a part."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_as_close, assert_near, normal, randomize, untyped
from helpers import mesh as make_mesh
from jax.sharding import PartitionSpec as P

from jaxkern import Dilation, attention, ring_attention
from jaxkern.nn import LongNet
from jaxkern.testing import plain

EMBED, HEADS, SEQ = 24, 4, 12
LENGTHS, RATES = (4, 16), (1, 3)
X, MEMORY = normal(0, (2, SEQ, EMBED)), normal(1, (2, 5, EMBED))
KEYS = jnp.arange(SEQ)[None] < jnp.array([[SEQ], [9]])
SEEN = jnp.arange(5)[None] < jnp.array([[5], [3]])


def build(**options) -> Any:
    """Make a model whose biases are not 0 and scales of norms not 1."""
    given: dict[str, Any] = {"dilation": Dilation(LENGTHS, RATES), "num_layers": 1}
    module = LongNet(EMBED, HEADS, rngs=nnx.Rngs(0), **given | options)
    return randomize(module)


def bias(offsets, is_causal):
    """The logarithm of the number of patterns in which a head's query sees a key."""
    count = np.zeros((HEADS, SEQ, SEQ))
    for head in range(HEADS):
        for w, r in zip(LENGTHS, RATES, strict=True):
            first = head % r if offsets == "paper" else head // -(-HEADS // r)
            for segment in range(0, SEQ, w):
                rows = np.arange(segment, min(segment + w, SEQ))[first::r]
                count[head, rows[:, None], rows] += 1
    seen = np.tri(SEQ) if is_causal else 1
    with np.errstate(divide="ignore"):
        return np.log(count * seen)[None]


def xpos(x, base):
    """Rotate pairs and scale them, by complex numbers; positions count from 0."""
    place, pair = np.arange(SEQ)[:, None], np.arange(x.shape[-1] // 2)
    half = x.shape[-1] // 2
    zeta = (pair / half + 0.4) / 1.4
    angles = place * 1e4 ** (-pair / half)
    factors = zeta ** (place / base) * np.exp(1j * angles)
    wide = jnp.result_type(x.dtype, jnp.float32)
    cos, sin = (jnp.asarray(f[:, None], wide) for f in (factors.real, factors.imag))
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def norm(x, layer, epsilon):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * layer["scale"] + layer["bias"]


def attend(x, z, layer, bias, base, epsilon):
    def project(x, part):
        return jnp.einsum("bte,ehd->bthd", x, part["kernel"]) + part["bias"]

    q, k, v = project(x, layer["query"]), project(z, layer["key"]), layer["value"]
    if base is not None:
        q, k = xpos(q, base), xpos(k, -base)
    heads, _ = plain.attention(q, k, project(z, v), bias)
    if "sub_norm" in layer:
        flat = heads.reshape(*heads.shape[:2], -1)
        heads = norm(flat, layer["sub_norm"], epsilon).reshape(heads.shape)
    out = layer["out"]
    return jnp.einsum("bthd,hde->bte", heads, out["kernel"]) + out["bias"]


def definition(state, x, memory, *, biases, base, epsilon):
    of_self, of_memory = biases
    for block in state["blocks"].values():
        y = norm(x, block["attention_norm"], epsilon)
        x = x + attend(y, y, block["attention"], of_self, base, epsilon)
        if "cross_attention" in block:
            y = norm(x, block["cross_norm"], epsilon)
            x = x + attend(
                y, memory, block["cross_attention"], of_memory, None, epsilon
            )
        y = norm(x, block["mlp_norm"], epsilon)
        y = y @ block["up"]["kernel"] + block["up"]["bias"]
        y = y * (1 + jax.lax.erf(y / np.sqrt(2))) / 2
        y = norm(y, block["hidden_norm"], epsilon)
        x = x + y @ block["down"]["kernel"] + block["down"]["bias"]
    return norm(x, state["norm"], epsilon)


CASES: dict[str, dict[str, Any]] = {
    "torchscale's encoder": {
        "dilation": Dilation(LENGTHS, RATES, head_offsets="blocks"),
        "xpos_scale_base": 512.0,
    },
    "decoder beside an encoder": {
        "is_causal": True,
        "xpos_scale_base": 5.0,
        "cross_attention": True,
        "norm_epsilon": 1e-2,
    },
}


@pytest.mark.usefixtures("promoting")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_values_and_gradients(options):
    module = build(**options)
    graph, state = nnx.split(module)
    crossing, g = options.get("cross_attention", False), normal(3, X.shape)
    given = {"key_mask": KEYS} | ({"memory_mask": SEEN} if crossing else {})

    def ours(state, x, memory):
        extra = {"memory": memory} if crossing else {}
        return nnx.merge(graph, state)(x, **given, **extra)

    offsets = options.get("dilation") or Dilation(LENGTHS, RATES)
    of_self = bias(offsets.head_offsets, options.get("is_causal", False))
    of_self = np.where(np.asarray(KEYS)[:, None, None], of_self, -np.inf)
    of_memory = np.where(np.asarray(SEEN)[:, None, None], 0, -np.inf)
    base = options.get("xpos_scale_base")
    define = partial(
        definition,
        biases=(of_self, of_memory),
        base=base,
        epsilon=options.get("norm_epsilon", 1e-5),
    )
    args = nnx.to_pure_dict(state), X, MEMORY
    got = jax.jit(plain.with_gradients(ours))(g, state, X, MEMORY)
    got = got[0], (nnx.to_pure_dict(got[1][0]), *got[1][1:])
    run = plain.with_gradients(define)
    results = got, jax.jit(run)(g, *args), plain.in_float64(run, g, *args)
    # A bias that all keys have hardly changes the softmax: its gradient cancels.
    biases = [
        [
            block[name]["key"].pop("bias")
            for block in gradients["blocks"].values()
            for name in sorted({"attention", "cross_attention"} & block.keys())
        ]
        for _, (gradients, *_) in results
    ]
    for a, _, c in zip(*biases, strict=True):
        np.testing.assert_allclose(a, c, rtol=0, atol=1e-5)
    assert_as_close(*results)


def test_positions_and_a_ring():
    """Devices that share the tokens attend as one, with positions of the whole."""
    dilation, layers = Dilation((4, 12), (1, 2)), {"num_layers": 2}
    whole = build(dilation=dilation, is_causal=True, xpos_scale_base=7.0, **layers)
    ring = partial(ring_attention, axis_name="seq", dilation=dilation)
    shared = build(
        dilation=None, attention_fn=ring, is_causal=True, xpos_scale_base=7.0, **layers
    )
    graph, state = nnx.split(shared)
    nnx.update(shared, nnx.state(whole))
    spec = P(None, "seq")
    run = jax.shard_map(
        lambda state, x, places: nnx.merge(graph, state)(x, positions=places),
        mesh=make_mesh(seq=3),
        in_specs=(P(), spec, P("seq")),
        out_specs=spec,
    )
    got = jax.jit(run)(nnx.state(shared), X, jnp.arange(100, 100 + SEQ))
    assert_near(got, nnx.jit(lambda m, x: m(x))(whole, X))


def test_initial_kernels_have_magnetos_gain():
    make = partial(LongNet, 128, 4, num_layers=1, rngs=nnx.Rngs(0))
    attend, feed = (2 / (128 + 128)) ** 0.5, (2 / (128 + 512)) ** 0.5
    for options, gain in [
        ({}, np.log(2) ** 0.5),
        ({"cross_attention": True}, np.log(3) ** 0.5),
        ({"gain": 3.0}, 3),
    ]:
        block = make(**options).blocks[0]
        stds = [
            (block.attention.query, attend),
            (block.attention.value, gain * attend),
            (block.attention.out, gain * attend),
            (block.up, gain * feed),
            (block.down, gain * feed),
        ]
        if block.cross_attention is not None:
            stds += [(block.cross_attention.value, attend)]
        for layer, std in stds:
            assert float(layer.kernel[...].std()) == pytest.approx(std, rel=0.03)


@pytest.mark.usefixtures("promoting")
def test_dtypes():
    module, low = build(), build(dtype=jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    assert jax.eval_shape(module, x).dtype == jnp.float32
    assert jax.eval_shape(low, X).dtype == jnp.bfloat16


def model(*args, **options):
    given = {"num_layers": 1, "rngs": nnx.Rngs(0)} | options
    return lambda: untyped.nn.LongNet(*(args or (EMBED, HEADS)), **given)


def call(x=X, *, built=None, **options):
    def run():
        made = {"dilation": Dilation((4,), (1,))} | (built or {})
        return model(**made)()(x, **options)

    return run


CROSS = {"cross_attention": True}
REFUSALS = [
    (model(num_layers=0), ValueError, "LongNet: num_layers must be an integer of at"),
    (
        model(dilation=Dilation((4,), (1,)), attention_fn=attention),
        ValueError,
        "LongNet: dilation must be None with an attention_fn",
    ),
    (model(attention_fn=3), TypeError, "attention_fn must be callable, got int"),
    (
        model(12, 4, xpos_scale_base=512.0),
        ValueError,
        "embed_dim / num_heads must be an even integer for xpos_scale_base, got 12 / 4",
    ),
    (model(xpos_scale_base=0), ValueError, "xpos_scale_base must be positive, got 0"),
    (model(norm_epsilon="small"), TypeError, "norm_epsilon must be one number"),
    (model(gain=-1.0), ValueError, "gain must be positive, got -1.0"),
    (model(cross_attention=1), TypeError, "cross_attention must be True or False"),
    (
        call(X[..., 1:]),
        ValueError,
        r"LongNet: x must have shape \(..., 24\), got \(2, 12, 23\)",
    ),
    (call(X[0]), ValueError, r"x must have shape \(batch, seq, 24\), got \(12, 24\)"),
    (
        call(key_mask=KEYS[:1]),
        ValueError,
        r"LongNet: key_mask must have shape \(2, 12\), got \(1, 12\)",
    ),
    (call(built=CROSS), ValueError, "memory must be given for cross_attention, got"),
    (call(memory=X), ValueError, "memory must be None without cross_attention"),
    (
        call(built=CROSS, memory=X[:1]),
        ValueError,
        r"memory must have shape \(2, seq_memory, 24\), got \(1, 12, 24\)",
    ),
    (
        call(built=CROSS, memory=X, memory_mask=SEEN),
        ValueError,
        r"memory_mask must have shape \(2, 12\), got \(2, 5\)",
    ),
    (
        call(positions=jnp.arange(SEQ)),
        ValueError,
        "LongNet: positions must be None without xpos_scale_base",
    ),
    (
        call(built={"xpos_scale_base": 512.0}, positions=jnp.arange(3)),
        ValueError,
        r"LongNet: positions must have shape \(12,\) or \(2, 12\), got \(3,\)",
    ),
    (
        call(jnp.ones((1, 80_000, EMBED)), built={"xpos_scale_base": 512.0}),
        ValueError,
        "xpos_scale_base must be at least 574 for 80000 tokens in float32, got 512.0",
    ),
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("run, error, message", REFUSALS)
def test_refusals(run, error, message):
    with pytest.raises(error, match=message):
        run()
