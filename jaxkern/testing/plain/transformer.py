"""The language model `TransformerLM` as one writes it in jnp, layer by layer."""

from collections.abc import Mapping
from functools import reduce
from operator import getitem, itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .attention import attention, causal_bias, rotary
from .mlp import swiglu

EPSILON = 1e-5


def rms_norm(x, scale):
    """RMSNorm over the last axis, computed in float32 or wider."""
    wide = x.astype(np.promote_types(x.dtype, jnp.float32))
    wide = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + EPSILON)
    return (wide * scale).astype(x.dtype)


def attend(x, layer, theta):
    """Causal self-attention of one layer, with rotary positions."""
    query, key, value = (
        jnp.einsum("btd,dhe->bthe", x, layer[name])
        for name in ("query", "key", "value")
    )
    query, key = rotary(query, theta), rotary(key, theta)
    heads, _ = attention(query, key, value, causal_bias(x.shape[1]))
    return jnp.einsum("bthe,hed->btd", heads, layer["out"])


def logits(weights: Mapping[str, Any], tokens: jax.Array, theta: float = 1e4) -> Any:
    """Logits of every token, (batch, seq, vocab)."""
    x = weights["embedding"][tokens]
    for layer in weights["layers"]:
        x = x + attend(rms_norm(x, layer["attention_norm"]), layer, theta)
        kernels = layer["gate"], layer["up"], layer["down"]
        x = x + swiglu(rms_norm(x, layer["mlp_norm"]), *kernels)
    return rms_norm(x, weights["norm"]) @ weights["head"]


def loss(
    weights: Mapping[str, Any],
    tokens: jax.Array,
    targets: jax.Array,
    theta: float = 1e4,
) -> Any:
    """Return the mean cross-entropy, with all logits in memory."""
    return token_losses(logits(weights, tokens, theta), targets).mean()


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the cross-entropy of each token, in float32 or wider."""
    wide = logits.astype(np.promote_types(logits.dtype, jnp.float32))
    each = jnp.take_along_axis(jax.nn.log_softmax(wide), targets[..., None], -1)
    return -each[..., 0]


# Where the state of a layer has each of its weights.
PLACES = {
    "attention_norm": ("attention_norm", "scale"),
    "query": ("attention", "query", "kernel"),
    "key": ("attention", "key", "kernel"),
    "value": ("attention", "value", "kernel"),
    "out": ("attention", "out", "kernel"),
    "mlp_norm": ("mlp_norm", "scale"),
    "gate": ("mlp", "w_gate"),
    "up": ("mlp", "w_up"),
    "down": ("mlp", "w_down"),
}


def unscanned(layers: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the state of layers by their number, whether they are scanned or not."""
    if "attention" not in layers:
        return layers
    count = len(jax.tree.leaves(layers)[0])
    return {i: jax.tree.map(itemgetter(i), layers) for i in range(count)}


def from_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Take the weights from the pure state of a `TransformerLM`.

    The layers may be scanned or unrolled.
    """
    layers = unscanned(state["layers"])
    return {
        "embedding": state["embedding"],
        "layers": [
            {name: reduce(getitem, path, layers[i]) for name, path in PLACES.items()}
            for i in range(len(layers))
        ],
        "norm": state["norm"]["scale"],
        "head": state["head"],
    }
