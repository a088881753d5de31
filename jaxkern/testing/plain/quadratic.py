"""The language model `QuadraticTransformer`, and the loss it is trained with."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from .attention import rotary
from .masked import masked_bilinear

EPSILON = 2.0**-23
WEIGHTS = "left", "right", "down"


def rms_norm(x, scale):
    """RMSNorm over the last axis, in the dtype of `x`."""
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON) * scale


def logits(
    state: Mapping[str, Any],
    masks: Mapping[tuple[int, str], Any],
    ids: Any,
    key_mask: Any = None,
    rotate: Callable[[Any], Any] = rotary,
) -> Any:
    r"""Compute the logits of every token, (batch, seq, vocab).

    The weights of attention are squared logits, and every MLP is bilinear:

    $$p_{ij} = \left(\frac{q_i \cdot k_j}{\mathrm{dim}}\right)^2 \ (j \le i), \quad
    \mathrm{mlp}(x) = (x W_1 + b_1) \odot (x W_2 + b_2)\, W_3 + b_3$$

    Args:
        state: The pure state of the parameters of a `QuadraticTransformer`.
        masks: A mask for each sample by layer and name, one of "left", "right" and
            "down"; weights that are not in it are whole.
        ids: (batch, seq).
        key_mask: (batch, seq), False where a key is not seen; None for all True.
        rotate: The rotary embedding of queries and keys.
    """
    embedding = state["embed"]["embedding"]
    batch, seq = ids.shape
    seen = jnp.tri(seq, dtype=embedding.dtype)[None, None]
    if key_mask is not None:
        seen = seen * key_mask[:, None, None, :]
    x = embedding[ids]
    for i, block in state["blocks"].items():
        attention, mlp = block["attention"], block["mlp"]
        q, k, v = (
            jnp.einsum("bse,ehd->bshd", x, p["kernel"]) + p["bias"][None, None]
            for p in (attention["query"], attention["key"], attention["value"])
        )
        scale = attention["norm"]["scale"]
        q, k = rotate(rms_norm(q, scale)), rotate(rms_norm(k, scale))
        pattern = (jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1]) ** 2
        z = jnp.einsum("bhqk,bkhd->bqhd", pattern * seen, v)
        x = x + jnp.einsum("bshd,hde->bse", z, attention["out"]["kernel"])
        whole = jnp.ones((batch, 1, 1), x.dtype)
        x = x + masked_bilinear(
            x,
            [mlp[name]["kernel"] for name in WEIGHTS],
            [masks.get((i, name), whole) for name in WEIGHTS],
            [mlp[name]["bias"] for name in WEIGHTS],
        )
    return x @ embedding.T
