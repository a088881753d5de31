"""The configurations of our kernels that a launch may choose, each by a name.

A name is the op, the launch, and what tells it from others: the dim, the tile (rows x
columns of FlashMLP's, tokens of a masked product's, columns of the others'), the kind
of mask. Sizes of arguments, which a module has too, are the same for a family.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import BlockMask
from jaxkern._attention.block_mask.mask import with_keys
from jaxkern._attention.dilation import HeadStride
from jaxkern._attention.hopper import kernels as _attention_kernels
from jaxkern._core.activations import ACTIVATIONS
from jaxkern._masked.hopper import gradients as _masked_gradients
from jaxkern._masked.hopper import product as _masked_product
from jaxkern._masked.packed import WORD
from jaxkern._mlp.hopper import flash, flash_tiles, fused, sparse
from jaxkern._mlp.thresholds import LARGEST_FLASH_RANK
from jaxkern._mosaic.launch import CONTRACTED_STEP
from jaxkern._mosaic.work import GATED_COLUMNS, TILE_COLUMNS
from jaxkern._sparsity.hopper.product import sparse_matmul

HEADS, BATCH, HIDDEN, SEQ = 16, 2048, 1024, 2048
# Each makes a function and its arguments.
Build = Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
Cases = Iterator[tuple[str, Build]]
Array = tuple[int, ...] | tuple[tuple[int, ...], Any]


def _case(make: Callable[..., Any], *arrays: Array):
    """A function and its arguments: shapes of 16 bits, or shapes with a dtype."""
    pairs = (a if isinstance(a[0], tuple) else (a, jnp.bfloat16) for a in arrays)
    return make, tuple(jax.ShapeDtypeStruct(*pair) for pair in pairs)


def _attention(
    run: Callable[..., Any],
    dim: int,
    mask: Callable[[], BlockMask],
    rate: int = 1,
    backward: bool = True,
):
    """With two query heads a key head, of two batches."""
    key = 2, SEQ, rate * 2, dim
    arrays: list[Array] = [(2, SEQ, rate * 4, dim), key, key]
    if backward:
        arrays += [(2, SEQ, 4, dim), ((2, 4, 2, SEQ), jnp.float32)]
    dilation = HeadStride(rate, heads=4, run=2) if rate > 1 else None
    run = partial(run, mask=mask(), scale=dim**-0.5, dilation=dilation)
    return _case(run, *arrays)


def _attention_masks() -> dict[str, tuple[Sequence[int], Callable[[], BlockMask]]]:
    """By name: head dims, and a mask whose partial blocks ask one kind of predicate."""
    every = 16, 32, 48, 64, 80, 96, 128, 144, 192, 208, 224, 256
    ids = np.arange(SEQ) // 300

    def causal(block_size=128):
        return BlockMask.causal(SEQ, SEQ, block_size=block_size)

    def in_blocks():
        blocks = np.random.default_rng(0).random((4, SEQ // 128, SEQ // 128)) < 0.5
        return BlockMask.from_blocks(blocks) & causal()

    return {
        "causal": (every, causal),
        "blocks of 64": ((64, 128, 256), partial(causal, 64)),
        "documents": ((64, 128, 256), lambda: BlockMask.document(ids) & causal()),
        "keys": ((128,), lambda: with_keys(causal(), np.ones((2, 1, SEQ), bool))),
        "in blocks": ((128,), in_blocks),
        "bits": ((128,), lambda: BlockMask.from_dense(np.tri(SEQ, SEQ) % 3 == 1)),
        "strided": ((128,), lambda: BlockMask.strided(SEQ, SEQ, stride=2) & causal()),
    }


def attention_cases() -> Cases:
    """Every head dim, and every kind of predicate."""
    masks = _attention_masks()
    masks["dilated"] = (64, 128, 256), masks["causal"][1]
    for name, (dims, mask) in masks.items():
        rate = 4 if name == "dilated" else 1
        for dim in dims:
            launches: dict[str, Any] = {
                "forward": partial(_attention_kernels.forward, exact=True),
                "dq": _attention_kernels.backward_q,
            }
            for wanted in _attention_kernels.kv_launches(dim):
                label = " ".join(f"d{x[0]}" for x in wanted)
                launches[label] = partial(_attention_kernels.backward_kv, wanted=wanted)
            for label, run in launches.items():
                build = partial(_attention, run, dim, mask, rate, label != "forward")
                yield f"attention {label} {dim} {name}", build


def _masked(make: Callable[..., Any], kind: str, dtype: Any, *wide: int):
    """Arguments of four samples with 256 tokens, of `wide` features each."""
    samples, seq, d_in, d_out = 4, 256, 512, 2048
    rows = d_in // WORD if kind == "bits" else d_in
    features = [(samples, seq, n) for n in wide]
    return _case(make, *features, (1, d_in, d_out), ((samples, rows, d_out), dtype))


def masked_cases() -> Cases:
    """Every configuration, and every kind of mask: of 32 bits, of 16, and packed."""
    kernels = _masked_product
    tiles = [kernels.MaskedTiles(n, k) for n in kernels.TILE_TOKENS for k in (1, 2)]
    masks: dict[str, tuple[Any, Any, Sequence[Any]]] = {
        "logits": ("straight_through", jnp.float32, tiles),
        "mask": ("mask", jnp.bfloat16, tiles[:1]),
        "bits": ("bits", jnp.int32, tiles),
    }
    # A backward reads bits for logits, which a forward then writes.
    products: dict[str, tuple[int, dict[str, bool], Sequence[str]]] = {
        "forward": (512, {}, ("logits", "mask", "bits")),
        "packing": (512, {"pack": True}, ("logits",)),
        "dx": (2048, {"transposed": True}, ("mask", "bits")),
    }
    for label, (features, options, names) in products.items():
        for name in names:
            kind, dtype, configs = masks[name]
            for config in configs:
                make = kernels.product_kernel(kind, tiles=config, **options)
                size = f"{config.tokens}{' split' if config.splits > 1 else ''}"
                build = partial(_masked, make, kind, dtype, features)
                yield f"masked {label} {size} {name}", build
    # Straight-through's masks alone are not read, and the others are as bits.
    sloped = jnp.float32, ("dmask", "dmask dw")
    gradients: dict[Any, tuple[Any, Sequence[str]]] = {
        "mask": (jnp.bfloat16, ("dw", "dmask", "dmask dw")),
        "bits": (jnp.int32, ("dw", "dmask", "dmask dw")),
        "straight_through": (jnp.float32, ("dmask",)),
        "one_plus_sigmoid": sloped,
        "reinmax": sloped,
    }
    for kind, (dtype, labels) in gradients.items():
        made = jnp.float32 if kind == "bits" else dtype
        for label in labels:
            of = _masked_gradients.Wanted(False, "dw" in label, "dmask" in label, made)
            make = _masked_gradients.gradients_kernel(kind, of)
            build = partial(_masked, make, kind, dtype, 512, 2048)
            yield f"masked {label} {of.columns} {kind}", build


def _flash_mlp(
    label: str, activation: str, dim: int, ups: int, inputs: int = 1
) -> Cases:
    """All launches of one form, with all tiles that can be chosen.

    ups, inputs: how many first matrices there are, and how many inputs.
    """
    # The label and the kernel of a launch, and the weights whose gradients it makes.
    launches: list[tuple[str, str, tuple[Any, ...]]] = [("forward", "forward", ())]
    launches.append(("dx" if inputs == 1 else "dx0 dx1", "backward_x", ()))
    names = ("gate", "w1", "w2")[-ups - 1 :]
    for wanted in flash_tiles.weight_passes(dim, ups):
        of = " ".join(f"d{names[n]}" for n in wanted)
        launches.append((of, "backward_w", (wanted,)))
    for name, kernel, wanted in launches:
        shapes = [(BATCH, inputs * dim), *[(dim, HIDDEN)] * ups, (HIDDEN, dim)]
        if kernel != "forward":
            shapes.append((BATCH, dim))
        arrays = [(HEADS, *shape) for shape in shapes]
        for config in flash_tiles.configs(kernel, dim, ups, inputs):
            size = f"{config.rows}x{config.columns}{' split' if config.split else ''}"
            make = partial(getattr(flash, kernel), activation, *wanted, config)
            yield f"flash_mlp {label}{name} {dim} {size}", partial(_made, make, arrays)


def _made(make: Callable[[], Any], arrays: Sequence[Array]):
    return _case(make(), *arrays)


def _dims(largest: int) -> Sequence[int]:
    return range(CONTRACTED_STEP, largest + 1, CONTRACTED_STEP)


def flash_mlp_cases() -> Cases:
    """Every configuration that can be launched with silu.

    The other activations can be launched with every dim too, and are compiled with 64,
    in both forms; and ReLU² with the ranks at which `low_rank_relu2` takes this kernel.
    """
    for dim in _dims(flash.MAX_DIM):
        yield from _flash_mlp("", "silu", dim, ups=1)
    for dim in _dims(flash.MAX_GATED_DIM):
        yield from _flash_mlp("gated ", "silu", dim, ups=2)
    for dim in _dims(LARGEST_FLASH_RANK):
        yield from _flash_mlp("pair ", "silu", dim, ups=2, inputs=2)
        yield from _flash_mlp("relu2 ", "relu2", dim, ups=1)
    for activation in ACTIVATIONS:
        if activation != "silu":
            yield from _flash_mlp(f"{activation} ", activation, 64, ups=1)
            yield from _flash_mlp(f"{activation} gated ", activation, 64, ups=2)


# Sizes of one layer of 7B, and a few tokens: (tokens, rank, hidden).
TOKENS, RANK, WIDTH = 2048, 1024, 16512
CORE, UP, DOWN, WIDE = (TOKENS, RANK), (RANK, WIDTH), (WIDTH, RANK), (TOKENS, WIDTH)
# The right factor lies transposed, and what is done to the result.
PACKED_PRODUCTS = ((True, "identity"), (False, "relu2"), (False, "identity"))


def matmul_cases() -> Cases:
    """Dense, with every epilogue: of low-rank MLPs."""

    def named(name: str, make: Callable[..., Any], *shapes: Array):
        return name, partial(_case, make, *shapes)

    for columns in TILE_COLUMNS:
        yield named(f"relu2 forward {columns}", fused.relu2_forward(columns), CORE, UP)
        make = fused.relu2_backward(columns)
        yield named(f"relu2 backward {columns}", make, CORE, DOWN, WIDE)
    pair = TOKENS, 2 * RANK
    for columns in GATED_COLUMNS:
        for keep, label in ((False, ""), (True, " kept")):
            make = fused.gated_forward(keep, columns)
            yield named(f"gated forward{label} {columns}", make, pair, UP, UP)
            yield named(f"swiglu forward{label} {columns}", make, CORE, UP, UP)
        make = fused.gated_backward(columns)
        yield named(f"gated backward {columns}", make, CORE, DOWN, WIDE, WIDE)


def sparse_cases() -> Cases:
    """2:4: selections, and products on sparse tensor cores."""
    for columns in sparse.SELECT_COLUMNS:
        for shrink, method in ((False, "top2"), (True, "soft")):
            for keep, label in ((False, ""), (True, " kept")):
                make = sparse.select_forward(shrink, keep, columns)
                name = f"select {method}{label} {columns}"
                yield name, partial(_case, make, CORE, UP)
    values, words = (TOKENS, WIDTH // 2), (TOKENS // 64, WIDTH // 64, 128)
    # Those that a packed MLP launches.
    for columns in TILE_COLUMNS:
        for transposed, activation in PACKED_PRODUCTS:
            make = sparse_matmul(transposed, activation, columns)
            right, kind = (UP, "sparse T") if transposed else (DOWN, "sparse")
            build = partial(_case, make, values, (words, jnp.int32), right)
            yield f"{kind} {activation} {columns}", build


@cache
def every_case() -> dict[str, Build]:
    low_rank = matmul_cases(), sparse_cases()
    return dict(chain(flash_mlp_cases(), attention_cases(), masked_cases(), *low_rank))
