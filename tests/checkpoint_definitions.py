"""Tiny folders in the form of Hugging Face and what they mean, written by hand."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from jaxkern import RotaryScaling

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"max_position_embeddings": 32}
# Without these keys transformers gives a token no gradient, and stops at another one.
SIZES |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
OPTIONS: dict[str, Any] = {"vocab_size": 50, "context_length": 32, "embed_dim": 24}
OPTIONS |= {"hidden_dim": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
OPTIONS |= {"rope_pairs": "halves", "norm_epsilon": 1e-6}
GEMMA: dict[str, Any] = OPTIONS | {
    "head_dim": 8,
    "norm": "rms_plus_one",
    "norm_placement": "both",
    "activation": "gelu",
    "tie_embeddings": True,
    "embedding_scale": 24**0.5,
    "window": 5,
    "full_attention_every": 2,
}


class Case(NamedTuple):
    """A config.json, and the options of `TransformerLM` that it means."""

    raw: dict[str, Any]
    options: dict[str, Any]


def case(model_type: str, raw: dict[str, Any], options: dict[str, Any]) -> Case:
    return Case({"model_type": model_type} | SIZES | raw, OPTIONS | options)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "Llama 3.1": case(
        "llama",
        {"rope_theta": 500.0, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-5},
        {
            "rope_theta": 500.0,
            "norm_epsilon": 1e-5,
            "rope_scaling": RotaryScaling(
                "llama3", 8.0, original_context_length=16, high_frequency_factor=4.0
            ),
        },
    ),
    "Llama with biases": case(
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 8}
        | {"tie_word_embeddings": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_dim": 8}
        | {"tie_embeddings": True},
    ),
    "Mistral": case("mistral", {"sliding_window": 5}, {"window": 5}),
    "Qwen 2.5": case(
        "qwen2",
        {
            "sliding_window": 8,
            "use_sliding_window": False,
            "rope_parameters": {
                "rope_theta": 100.0,
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 8,
                "original_max_position_embeddings": 64,
            },
        },
        {
            "qkv_bias": True,
            "rope_theta": 100.0,
            "rope_scaling": RotaryScaling(
                "yarn", 4.0, original_context_length=64, beta_fast=8.0
            ),
        },
    ),
    "Qwen 3": case(
        "qwen3",
        {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 4}
        | {"use_sliding_window": True, "max_window_layers": 0},
        {"head_dim": 8, "tie_embeddings": True, "qk_norm": "head", "window": 4},
    ),
    "OLMo 2": case(
        "olmo2",
        {"num_key_value_heads": None, "rms_norm_eps": 1e-6},
        {"num_kv_heads": 4, "qk_norm": "embed", "norm_placement": "post"},
    ),
    "Gemma 2": case(
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 2.0,
        },
        GEMMA
        | {"attention_scale": 0.25, "attention_softcap": 1.0, "logit_softcap": 2.0},
    ),
    "Gemma 3": case(
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 100,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
        GEMMA
        | {
            "num_layers": 3,
            "attention_scale": 0.25,
            "qk_norm": "head",
            "rope_theta": 100.0,
            "local_rope_theta": 20.0,
            "rope_scaling": RotaryScaling("linear", 8.0),
        },
    ),
    "Phi-3": case(
        "phi3",
        {
            "hidden_size": 32,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.5, 2.0],
                "long_factor": [1, 2, 8],
            },
        },
        {
            "embed_dim": 32,
            "norm_epsilon": 1e-5,
            "rotary_dim": 6,
            "rope_scaling": RotaryScaling(
                "longrope", 2.0, original_context_length=16, factors=(1.0, 2.0, 8.0)
            ),
        },
    ),
}


def tensors_of(case: Case, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return random tensors with the names and the shapes that transformers writes."""
    raw, options = case
    embed, hidden = raw["hidden_size"], raw["intermediate_size"]
    heads = raw["num_attention_heads"]
    kv_heads = raw["num_key_value_heads"] or heads
    dim = raw.get("head_dim", embed // heads)
    layer = {
        "self_attn.q_proj.weight": (heads * dim, embed),
        "self_attn.k_proj.weight": (kv_heads * dim, embed),
        "self_attn.v_proj.weight": (kv_heads * dim, embed),
        "self_attn.o_proj.weight": (embed, heads * dim),
        "mlp.gate_proj.weight": (hidden, embed),
        "mlp.up_proj.weight": (hidden, embed),
        "mlp.down_proj.weight": (embed, hidden),
        "post_attention_layernorm.weight": (embed,),
    }
    if raw["model_type"] != "olmo2":
        layer["input_layernorm.weight"] = (embed,)
    if raw["model_type"] == "olmo2" or raw["model_type"].startswith("gemma"):
        layer["post_feedforward_layernorm.weight"] = (embed,)
    if raw["model_type"].startswith("gemma"):
        layer["pre_feedforward_layernorm.weight"] = (embed,)
    if raw["model_type"] in ("qwen3", "gemma3_text"):
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (dim,)
    if raw["model_type"] == "olmo2":
        layer["self_attn.q_norm.weight"] = (heads * dim,)
        layer["self_attn.k_norm.weight"] = (kv_heads * dim,)
    biases = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    biases = biases if options.get("qkv_bias") else []
    biases += ["self_attn.o_proj"] if options.get("out_bias") else []
    if options.get("mlp_bias"):
        biases += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    for name in biases:
        layer[f"{name}.bias"] = layer[f"{name}.weight"][:1]
    if raw["model_type"] == "phi3":
        rows = [layer.pop(f"self_attn.{x}_proj.weight")[0] for x in "qkv"]
        layer["self_attn.qkv_proj.weight"] = (sum(rows), embed)
        del layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]
        layer["mlp.gate_up_proj.weight"] = (2 * hidden, embed)
    shapes = {"model.embed_tokens.weight": (50, embed), "model.norm.weight": (embed,)}
    if not options.get("tie_embeddings"):
        shapes["lm_head.weight"] = (50, embed)
    for i in range(raw["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    drawn = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    return {name: (0.3 * x).astype(dtype) for name, x in drawn.items()}


def state_of(case: Case, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the tensors as the state of a `TransformerLM` that is not scanned."""
    heads = case.raw["num_attention_heads"]
    dim = case.raw.get("head_dim", case.raw["hidden_size"] // heads)
    wide = {name: x.astype(np.float64) for name, x in tensors.items()}

    def project(rows, bias):
        kernel = rows.reshape(-1, dim, rows.shape[1]).transpose(2, 0, 1)
        bias = {} if bias is None else {"bias": bias.reshape(-1, dim)}
        return {"kernel": kernel, **bias}

    def layer(i):
        start = f"model.layers.{i}."
        own = {n.removeprefix(start): x for n, x in wide.items() if n.startswith(start)}
        get = own.get
        if (fused := get("self_attn.qkv_proj.weight")) is not None:
            q, k, v = np.split(fused, [heads * dim, (len(fused) + heads * dim) // 2])
            gate, up = np.split(own["mlp.gate_up_proj.weight"], 2)
        else:
            q, k, v = (own[f"self_attn.{x}_proj.weight"] for x in "qkv")
            gate, up = (own[f"mlp.{x}_proj.weight"] for x in ("gate", "up"))
        attention = {
            "query": project(q, get("self_attn.q_proj.bias")),
            "key": project(k, get("self_attn.k_proj.bias")),
            "value": project(v, get("self_attn.v_proj.bias")),
        }
        out = own["self_attn.o_proj.weight"]
        out = {"kernel": out.T.reshape(heads, dim, -1)}
        if (bias := get("self_attn.o_proj.bias")) is not None:
            out["bias"] = bias
        for ours, name in [("query_norm", "q_norm"), ("key_norm", "k_norm")]:
            if (scale := get(f"self_attn.{name}.weight")) is not None:
                attention[ours] = {"scale": scale}
        mlp = {"w_gate": gate.T, "w_up": up.T, "w_down": own["mlp.down_proj.weight"].T}
        for name in ("gate", "up", "down"):
            if (bias := get(f"mlp.{name}_proj.bias")) is not None:
                mlp[f"b_{name}"] = bias
        found = {"attention": attention | {"out": out}, "mlp": mlp}
        after = case.options.get("norm_placement", "pre") != "pre"
        norms = {
            "attention_norm": "input_layernorm",
            "attention_post_norm" if after else "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
        if case.options.get("norm_placement") == "both":
            norms["mlp_norm"] = "pre_feedforward_layernorm"
        scales = {ours: get(f"{name}.weight") for ours, name in norms.items()}
        return found | {
            name: {"scale": x} for name, x in scales.items() if x is not None
        }

    state = {
        "embedding": wide["model.embed_tokens.weight"],
        "norm": {"scale": wide["model.norm.weight"]},
        "layers": [layer(i) for i in range(case.raw["num_hidden_layers"])],
    }
    if "lm_head.weight" in wide:
        state["head"] = wide["lm_head.weight"].T
    return state


def write(folder: Path, case: Case, tensors: dict[str, np.ndarray]) -> Path:
    """Write a folder, and return it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.raw))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
