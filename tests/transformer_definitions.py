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


# The frame of other families. Its options are those of `TransformerLM`, its weights the
# state of one.


def normalize(x, norm, kind, epsilon):
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    scale = norm["scale"] + 1 if kind == "rms_plus_one" else norm["scale"]
    root = np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x / root * scale + norm.get("bias", 0)


def frequencies(theta, dim, scaling):
    """Return the rotary frequencies, and the factor of sines and cosines."""
    pairs = np.arange(dim // 2)
    plain = theta ** (-2 * pairs / dim)
    if scaling is None:
        return plain, 1.0
    factor, length = scaling.factor, scaling.original_context_length
    given = scaling.attention_factor
    if scaling.kind == "linear":
        return plain / factor, given or 1.0
    if scaling.kind == "longrope":
        root = np.sqrt(1 + np.log(factor) / np.log(length))
        return plain / np.array(scaling.factors), given or root
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        wavelengths = 2 * np.pi / plain
        smooth = (length / wavelengths - low) / (high - low)
        between = (1 - smooth) * plain / factor + smooth * plain
        shortened = np.where(wavelengths > length / low, plain / factor, between)
        return np.where(wavelengths < length / high, plain, shortened), given or 1.0

    def index(turns):
        return dim * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    # A ramp without a width is a step.
    steps = np.where(pairs > first, 1.0, 0.0)
    ramp = (pairs - first) / (last - first) if last != first else steps
    kept = 1 - np.clip(ramp, 0, 1)
    mixed = plain / factor * (1 - kept) + plain * kept
    return mixed, given or 0.1 * np.log(max(factor, 1)) + 1


def turn(x, theta, pairs, rotary_dim, scaling):
    """Rotate the first features of each head by complex multiplication."""
    dim = x.shape[-1] if rotary_dim is None else rotary_dim
    rates, factor = frequencies(theta, dim, scaling)
    turns = factor * np.exp(1j * np.arange(x.shape[1])[:, None, None] * rates)
    first, rest = x[..., :dim], x[..., dim:]
    if pairs == "halves":
        turned = (first[..., : dim // 2] + 1j * first[..., dim // 2 :]) * turns
        turned = np.concatenate([turned.real, turned.imag], -1)
    else:
        turned = (first[..., 0::2] + 1j * first[..., 1::2]) * turns
        turned = np.stack([turned.real, turned.imag], -1).reshape(first.shape)
    return np.concatenate([turned, rest], -1)


def cap(x, limit):
    return x if limit is None else limit * np.tanh(x / limit)


ACTIVATIONS = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: z / (1 + np.exp(-np.sqrt(8 / np.pi) * (z + 0.044715 * z**3))),
    "relu2": lambda z: np.maximum(z, 0) ** 2,
}


def frame_attention(x, weights, is_local, options):
    def project(name):
        projection = weights[name]
        y = np.einsum("btd,dhe->bthe", x, projection["kernel"])
        return y + projection.get("bias", 0)

    q, k, v = (project(name) for name in ("query", "key", "value"))
    kind = options.get("norm", "rms"), options.get("norm_epsilon", 1e-5)
    if over := options.get("qk_norm"):

        def of_heads(y, name):
            shape = y.shape if over == "head" else (*y.shape[:2], -1)
            return normalize(y.reshape(shape), weights[name], *kind).reshape(y.shape)

        q, k = of_heads(q, "query_norm"), of_heads(k, "key_norm")
    theta, scaling = options.get("rope_theta", 1e4), options.get("rope_scaling")
    if is_local and "local_rope_theta" in options:
        theta, scaling = options["local_rope_theta"], None
    pairs, turned = options.get("rope_pairs", "interleaved"), options.get("rotary_dim")
    q, k = (turn(y, theta, pairs, turned, scaling) for y in (q, k))
    k, v = (np.repeat(y, q.shape[2] // k.shape[2], 2) for y in (k, v))
    logits = np.einsum("bqhe,bkhe->bhqk", q, k)
    logits = logits * options.get("attention_scale", q.shape[-1] ** -0.5)
    logits = cap(logits, options.get("attention_softcap"))
    behind = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    seen = behind >= 0
    if is_local:
        seen &= behind < options["window"]
    p = softmax(np.where(seen, logits, -np.inf))
    heads = np.einsum("bhqk,bkhe->bqhe", p, v)
    out = weights["out"]
    return np.einsum("bthe,hed->btd", heads, out["kernel"]) + out.get("bias", 0)


def frame_mlp(x, weights, options):
    act = ACTIVATIONS[options.get("activation", "silu")]
    up = x @ weights["w_up"] + weights.get("b_up", 0)
    if "w_gate" in weights:
        hidden = act(x @ weights["w_gate"] + weights.get("b_gate", 0)) * up
    else:
        hidden = act(up)
    return hidden @ weights["w_down"] + weights.get("b_down", 0)


def frame_logits(state, tokens, options) -> Any:
    """Return the logits of a `TransformerLM` with this state and these options."""
    kind = options.get("norm", "rms"), options.get("norm_epsilon", 1e-5)
    x = state["embedding"][tokens] * options.get("embedding_scale", 1)
    for i in range(options["num_layers"]):
        layer = layer_of(state["layers"], i)
        every = options.get("full_attention_every")
        is_local = "window" in options and not (every and (i + 1) % every == 0)

        def norm_if(name, x, layer=layer):
            return normalize(x, layer[name], *kind) if name in layer else x

        y = norm_if("attention_norm", x)
        y = frame_attention(y, layer["attention"], is_local, options)
        x = x + norm_if("attention_post_norm", y)
        y = frame_mlp(norm_if("mlp_norm", x), layer["mlp"], options)
        x = x + norm_if("mlp_post_norm", y)
    x = normalize(x, state["norm"], *kind)
    head = state.get("head", state["embedding"].T)
    return cap(x @ head, options.get("logit_softcap"))


def layer_of(layers, i):
    """Return layer i of stacked or unrolled layers."""
    return tree_map(lambda x: x[i], layers) if "attention" in layers else layers[i]


def tree_map(f, tree):
    if isinstance(tree, dict):
        return {name: tree_map(f, x) for name, x in tree.items()}
    return f(tree)


def frame_loss(state, tokens, targets, options) -> Any:
    logits = frame_logits(state, tokens, options)
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return (lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()
