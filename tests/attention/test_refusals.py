from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_definitions import (
    attention_args,
    attention_float64,
    plain_attention,
    see,
)
from helpers import DTYPES, assert_as_close, mesh, to_float64, untyped, value_and_vjp

from jaxkern import (
    BlockMask,
    Dilation,
    attention,
    block_sparse_attention,
    cross_entropy,
    dilated_attention,
    merge_attention,
    rotary_embedding,
)

X = jnp.zeros((1, 8, 2, 4))
DILATION = Dilation([4], [1])
KEY = jax.random.key(0)
FLAGS = {
    "attention": ((X, X, X), {}, ("is_causal", "return_lse")),
    "block_sparse_attention": (
        (X, X, X),
        {"mask": BlockMask.causal(8, 8)},
        ("return_lse",),
    ),
    "dilated_attention": (
        (X, X, X),
        {"dilation": DILATION},
        ("is_causal", "return_lse"),
    ),
    "ring_attention": ((X, X, X), {"axis_name": "ring"}, ("is_causal", "return_lse")),
    "context_parallel_attention": (
        (X, X, X),
        {"axis_name": "ring"},
        ("is_causal", "return_lse"),
    ),
    "Dilation": (([4], [1]), {}, ("head_groups", "stop_gradient_mix")),
    "binary_concrete": ((X,), {"key": KEY}, ("hard",)),
    "gumbel_softmax": ((X,), {"key": KEY}, ("hard",)),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("op", FLAGS)
def test_flags_are_true_or_false(op):
    args, options, names = FLAGS[op]
    if op == "context_parallel_attention":
        options = options | {"mesh": mesh(ring=2)}
    run = partial(getattr(untyped, op), *args, **options)
    for name in names:
        message = f"^{op}: {name} must be True or False, and known when traced, got "
        for wrong in ("no", 1, None, jnp.array(True)):
            with pytest.raises(TypeError, match=message):
                run(**{name: wrong})
        with pytest.raises(TypeError, match=message):
            jax.eval_shape(lambda flag, name=name: run(**{name: flag}), True)


EMPTY = jnp.zeros((0, 8, 2, 4))
OF_NO_BATCH = {
    "attention": lambda x: attention(x, x, x, is_causal=True),
    "attention, tiles": lambda x: attention(*[jnp.tile(x, (1, 33, 1, 1))] * 3),
    "attention, mask": lambda x: attention(x, x, x, mask=jnp.ones((1, 1, 8, 8), bool)),
    "block-sparse": lambda x: block_sparse_attention(
        x, x, x, mask=BlockMask.causal(8, 8, block_size=4)
    ),
    "dilated": lambda x: dilated_attention(x, x, x, dilation=Dilation([3], [2])),
    "merge": lambda x: merge_attention(x, x[..., 0], x, x[..., 0])[0],
    "rotary": rotary_embedding,
    "cross_entropy": lambda x: cross_entropy(
        x[:, 0, 0], jnp.ones((4, 9)), jnp.zeros(0, int)
    ),
}


@pytest.mark.parametrize("op", OF_NO_BATCH.values(), ids=OF_NO_BATCH)
def test_an_empty_batch(op):
    value, vjp = jax.vjp(op, EMPTY)
    assert value.shape[0] == 0 and vjp(value)[0].shape == EMPTY.shape


def f32(*shape):
    return jnp.zeros(shape, jnp.float32)


GOOD = (f32(2, 8, 6, 4), f32(2, 9, 3, 4), f32(2, 9, 3, 5))
PARTS = (f32(2, 8, 6, 4), f32(2, 8, 6)) * 2
# The error, a pattern of its message, arguments, and options.
REFUSALS = {
    "list": (TypeError, "query must be an array, got list", ([1], *GOOD[1:]), {}),
    "int": (
        TypeError,
        "query must have a floating-point dtype",
        (GOOD[0].astype(int), *GOOD[1:]),
        {},
    ),
    "dtypes": (
        TypeError,
        "value must have the dtype of query, float32, got bfloat16",
        (*GOOD[:2], GOOD[2].astype(jnp.bfloat16)),
        {},
    ),
    "rank": (
        ValueError,
        r"\(batch, seq_q, heads, dim\)",
        (f32(8, 6, 4), *GOOD[1:]),
        {},
    ),
    "batch": (ValueError, "key must have shape", (f32(3, 8, 6, 4), *GOOD[1:]), {}),
    "empty": (ValueError, "no empty axis", (f32(2, 0, 6, 4), *GOOD[1:]), {}),
    "value": (ValueError, "value must have shape", (*GOOD[:2], f32(2, 8, 3, 5)), {}),
    "heads": (
        ValueError,
        "heads of query must be a multiple of those of key and value, got 5 and 3",
        (f32(2, 8, 5, 4), *GOOD[1:]),
        {},
    ),
    "mask list": (TypeError, "mask must be an array, got list", GOOD, {"mask": [True]}),
    "block mask": (
        TypeError,
        "mask must be a boolean array, got a BlockMask, which block_sparse_attention",
        GOOD,
        {"mask": BlockMask.causal(8, 9)},
    ),
    "mask dtype": (
        TypeError,
        "mask must be a boolean array, got float32",
        GOOD,
        {"mask": f32(2, 6, 8, 9)},
    ),
    "mask shape": (
        ValueError,
        r"= \(2, 6, 8, 9\), each of which may be 1, got \(2, 3, 8, 9\)",
        GOOD,
        {"mask": jnp.ones((2, 3, 8, 9), bool)},
    ),
    "mask rank": (
        ValueError,
        r"mask must have four axes, .* got \(8, 9\)",
        GOOD,
        {"mask": jnp.ones((8, 9), bool)},
    ),
    "scale": (ValueError, "scale must be finite, got nan", GOOD, {"scale": np.nan}),
    "scale array": (
        TypeError,
        r"must be one number, known when JAX traces and no array, got float32\[\]",
        GOOD,
        {"scale": jnp.float32(0.5)},
    ),
    "scale text": (TypeError, "must be one number, got '1'", GOOD, {"scale": "1"}),
    "scale flag": (TypeError, "must be one number, got True", GOOD, {"scale": True}),
    "name": (
        ValueError,
        "one of None, 'xla', 'cudnn', 'mosaic_gpu', got 'triton'",
        GOOD,
        {"implementation": "triton"},
    ),
    "the kernel's dtypes": (
        NotImplementedError,
        "dtype must be bfloat16 or float16 for mosaic_gpu, got float32",
        GOOD,
        {"implementation": "mosaic_gpu"},
    ),
    "no GPU": (
        NotImplementedError,
        "cudnn needs an NVIDIA GPU of compute capability 8.0 or more, got cpu",
        GOOD,
        {"implementation": "cudnn"},
    ),
}


@pytest.mark.usefixtures("unchecked_types", "chooses_hopper")
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_refusals(refusal):
    error, message, args, options = refusal
    with pytest.raises(error, match=f"^attention: .*{message}"):
        untyped.attention(*args, **options)


@pytest.mark.usefixtures("unchecked_types")
def test_a_traced_scale_is_refused():
    with pytest.raises(TypeError, match="attention: scale must be one number, known "):
        jax.jit(lambda scale: untyped.attention(*GOOD, scale=scale))(0.5)


@pytest.mark.usefixtures("unchecked_types")
def test_merge_refusals():
    for i, (wrong, error, message) in enumerate(
        [
            (f32(2, 8, 6), ValueError, r"out_a must have shape \(batch, seq, heads"),
            (f32(2, 8, 5), ValueError, r"lse_a must have shape \(2, 8, 6\)"),
            (PARTS[0].astype(jnp.bfloat16), TypeError, "dtype of out_a, float32"),
            (None, TypeError, "lse_b must be an array, got NoneType"),
        ]
    ):
        args = [*PARTS[:i], wrong, *PARTS[i + 1 :]]
        with pytest.raises(error, match=f"^merge_attention: .*{message}"):
            untyped.merge_attention(*args)
    with pytest.raises(TypeError, match="lse_a must be float32 or float64, got bfloat"):
        half = f32(2, 8, 6).astype(jnp.bfloat16)
        untyped.merge_attention(PARTS[0], half, PARTS[0], half)


class Device:
    def __init__(self, capability):
        self.platform, self.device_kind = "gpu", "a GPU"
        self.compute_capability = capability


def test_what_cudnn_is_not_asked_to_do(monkeypatch):
    def reason(capability, dim=64, dtype=jnp.bfloat16, dim_v=None, seq_kv=8, **options):
        monkeypatch.setattr(jax, "devices", lambda: [Device(capability)])
        query = jnp.zeros((1, 8, 2, dim), dtype)
        key = jnp.zeros((1, seq_kv, 2, dim), dtype)
        value = jnp.zeros((1, seq_kv, 2, dim_v or dim), dtype)
        with pytest.raises(NotImplementedError) as caught:
            attention(query, key, value, implementation="cudnn", **options)
        return str(caught.value)

    assert "8.0 or more, got a GPU" in reason("7.5")
    assert "must be bfloat16 or float16" in reason("9.0", dtype=jnp.float32)
    assert "at most 256, got 512 and 512" in reason("9.0", dim=512)
    assert "at most 128, got 256 and 256" in reason("8.0", dim=256)
    assert "multiple of 8" in reason("9.0", dim=20)
    assert "got 64 and 32" in reason("9.0", dim_v=32)
    assert "return_lse must be False" in reason("9.0", return_lse=True)
    mask = jnp.ones((1, 1, 8, 8), bool)
    assert "mask must be None for cudnn" in reason("9.0", mask=mask)
    assert "with is_causal, got 8 and 9" in reason("9.0", seq_kv=9, is_causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: d.__name__)
@pytest.mark.parametrize("is_causal", [False, True])
def test_cudnn(is_causal, dtype):
    args, (d_out, d_lse) = attention_args((2, 300, 300, 4, 2, 64, 64), dtype)
    run = partial(attention, is_causal=is_causal, implementation="cudnn")
    out, gradients = value_and_vjp(run, args, d_out)
    visible = see(None, is_causal, (2, 4, 300, 300))
    plain = partial(plain_attention, visible=visible, scale=64**-0.5)
    exact = attention_float64(args, (d_out, jnp.zeros_like(d_lse)), visible, 64**-0.5)
    # cuDNN's backward takes the mean of d_weights from out * d_out, where `out` is
    # rounded. The error acts as a cotangent of the lse. It is all that is left where
    # few keys are seen and the gradient cancels.
    rounding = exact[0][0] - to_float64(jax.jit(plain)(*args)[0])
    shift = (rounding * to_float64(d_out)).sum(-1).astype(d_lse.dtype)
    bound = value_and_vjp(plain, args, (d_out, shift))
    assert_as_close((out, gradients), (bound[0][0], bound[1]), (exact[0][0], exact[1]))
