"""The language model and its gradients by hand, in NumPy and float64."""

from typing import Any

import numpy as np

EPSILON = 1e-5


def rms_norm(x, scale):
    root = (np.mean(x**2, -1, keepdims=True) + EPSILON) ** -0.5
    return x * root * scale


def rms_norm_gradients(x, scale, g):
    root = (np.mean(x**2, -1, keepdims=True) + EPSILON) ** -0.5
    d_x = root * scale * g - root**3 * x * np.mean(x * scale * g, -1, keepdims=True)
    return d_x, (g * x * root).reshape(-1, x.shape[-1]).sum(0)


def rotate(x, theta, sign=1):
    """Rotate the pairs (2i, 2i + 1) by complex multiplication."""
    dim = x.shape[-1]
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * sign * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attend(x, layer, theta) -> Any:
    """Return the result, and a function from its gradient to those of x and layer."""
    q, k, v = (
        np.einsum("btd,dhe->bthe", x, layer[n]) for n in ("query", "key", "value")
    )
    q, k = rotate(q, theta), rotate(k, theta)
    scale, repeats = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    k, v = np.repeat(k, repeats, 2), np.repeat(v, repeats, 2)
    causal = np.tri(x.shape[1], dtype=bool)
    logits = np.where(causal, np.einsum("bqhe,bkhe->bhqk", q, k) * scale, -np.inf)
    p = softmax(logits)
    heads = np.einsum("bhqk,bkhe->bqhe", p, v)

    def gradients(g):
        d_heads = np.einsum("btd,hed->bthe", g, layer["out"])
        d_p = np.einsum("bqhe,bkhe->bhqk", d_heads, v)
        d_logits = scale * p * (d_p - (d_p * p).sum(-1, keepdims=True))
        d_q = rotate(np.einsum("bhqk,bkhe->bqhe", d_logits, k), theta, -1)
        d_k = rotate(np.einsum("bhqk,bqhe->bkhe", d_logits, q), theta, -1)
        d_v = np.einsum("bhqk,bqhe->bkhe", p, d_heads)
        d_k, d_v = (
            d.reshape(*d.shape[:2], -1, repeats, d.shape[-1]).sum(3) for d in (d_k, d_v)
        )
        d_x, d_layer = 0, {"out": np.einsum("bthe,btd->hed", heads, g)}
        for name, d in [("query", d_q), ("key", d_k), ("value", d_v)]:
            d_layer[name] = np.einsum("btd,bthe->dhe", x, d)
            d_x = d_x + np.einsum("bthe,dhe->btd", d, layer[name])
        return d_x, d_layer

    return np.einsum("bthe,hed->btd", heads, layer["out"]), gradients


def feed_forward(x, layer) -> Any:
    gate, up = x @ layer["gate"], x @ layer["up"]
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * up

    def product(a, b):
        return np.einsum("btd,bte->de", a, b)

    def gradients(g):
        d_hidden = g @ layer["down"].T
        d_up = d_hidden * gate * sigmoid
        d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_x = d_gate @ layer["gate"].T + d_up @ layer["up"].T
        d_layer = {"gate": product(x, d_gate), "up": product(x, d_up)}
        return d_x, d_layer | {"down": product(hidden, g)}

    return hidden @ layer["down"], gradients


def loss_and_gradients(weights, tokens, targets, theta=1e4) -> Any:
    """Return the mean cross-entropy, the logits, and the gradients of all weights."""
    x = weights["embedding"][tokens]
    tape = []
    for layer in weights["layers"]:
        for norm, fn in [
            ("attention_norm", lambda x, layer: attend(x, layer, theta)),
            ("mlp_norm", feed_forward),
        ]:
            y, gradients = fn(rms_norm(x, layer[norm]), layer)
            tape.append((x, norm, layer, gradients))
            x = x + y
    normed = rms_norm(x, weights["norm"])
    logits = normed @ weights["head"]
    p, hits = softmax(logits), np.eye(logits.shape[-1])[targets]
    loss = -np.log((p * hits).sum(-1)).mean()
    d_logits = (p - hits) / tokens.size
    g, d_norm = rms_norm_gradients(x, weights["norm"], d_logits @ weights["head"].T)
    d_layers = [{} for _ in weights["layers"]]
    for i, (x, norm, layer, gradients) in reversed(list(enumerate(tape))):
        d_normed, d_layer = gradients(g)
        d_x, d_layer[norm] = rms_norm_gradients(x, layer[norm], d_normed)
        d_layers[i // 2] |= d_layer
        g = g + d_x
    d_embedding = np.zeros_like(weights["embedding"])
    np.add.at(d_embedding, tokens, g)
    d_head = np.einsum("btd,btv->dv", normed, d_logits)
    d_weights = {"embedding": d_embedding, "layers": d_layers}
    return loss, logits, d_weights | {"norm": d_norm, "head": d_head}
