"""The families of models that `load` and `save` know, as tables.

Each table has the names of `TransformerLM` on the left and those of Hugging Face on the
right. Several of ours may share one of theirs: a key of config.json that sets several
options, or a tensor that holds several parameters, one behind the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Options, and keys of config.json.
OPTIONS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
GEMMA_OPTIONS = {
    "attention_scale": "query_pre_attn_scalar",
    "logit_softcap": "final_logit_softcapping",
}
# Keys that change a model of transformers, with the only values that ours can have.
ONLY = {"quantization_config": (None,), "use_bidirectional_attention": (None, False)}
# The values that transformers takes for keys that config.json lacks.
DEFAULTS = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "head_dim": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
}
QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

# Parameters of the model, and tensors.
OUTER = {
    "embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head": "lm_head.weight",
}
# Parameters of a layer, and tensors behind "model.layers.0.".
LAYER = {
    "attention.query.kernel": "self_attn.q_proj.weight",
    "attention.key.kernel": "self_attn.k_proj.weight",
    "attention.value.kernel": "self_attn.v_proj.weight",
    "attention.out.kernel": "self_attn.o_proj.weight",
    "attention.query.bias": "self_attn.q_proj.bias",
    "attention.key.bias": "self_attn.k_proj.bias",
    "attention.value.bias": "self_attn.v_proj.bias",
    "attention.out.bias": "self_attn.o_proj.bias",
    "attention.query_norm.scale": "self_attn.q_norm.weight",
    "attention.key_norm.scale": "self_attn.k_norm.weight",
    "mlp.w_gate": "mlp.gate_proj.weight",
    "mlp.w_up": "mlp.up_proj.weight",
    "mlp.w_down": "mlp.down_proj.weight",
    "mlp.b_gate": "mlp.gate_proj.bias",
    "mlp.b_up": "mlp.up_proj.bias",
    "mlp.b_down": "mlp.down_proj.bias",
}
PRE_NORMS = {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
}
POST_NORMS = {
    "attention_post_norm.scale": "post_attention_layernorm.weight",
    "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
}
FOUR_NORMS = POST_NORMS | {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "pre_feedforward_layernorm.weight",
}
FUSED = {
    "attention.query.kernel": "self_attn.qkv_proj.weight",
    "attention.key.kernel": "self_attn.qkv_proj.weight",
    "attention.value.kernel": "self_attn.qkv_proj.weight",
    "mlp.w_gate": "mlp.gate_up_proj.weight",
    "mlp.w_up": "mlp.gate_up_proj.weight",
}


@dataclass(frozen=True)
class Family:
    """The models of one `model_type`.

    Attributes:
        model_type: The name in config.json.
        architecture: The class in transformers.
        options: The options that config.json sets, each with its key.
        always: The options that all its models have. They all have halves for pairs of
            rotated features.
        layer: The parameters of a layer, each with its tensor.
        defaults: transformers' values of keys that config.json may lack.
        only: Keys with the only values that are supported.
        activation: The key of the activation.
        scaled_embedding: Whether embeddings are multiplied by the root of their size.
        windows: Which layers have the window `sliding_window`, if that is not null:
            none; all; the last, from layer `max_window_layers` on; or most, which are
            all but each n-th of n = `sliding_window_pattern`. For the last two the list
            `layer_types` goes first.
        partial_rotary: Whether `partial_rotary_factor` may be below 1.
    """

    model_type: str
    architecture: str
    options: Mapping[str, str]
    always: Mapping[str, Any] = field(default_factory=dict)
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER | PRE_NORMS)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: ONLY)
    activation: str = "hidden_act"
    scaled_embedding: bool = False
    windows: Literal["none", "all", "last", "most"] = "none"
    partial_rotary: bool = False


GEMMA: dict[str, Any] = {
    "layer": LAYER | FOUR_NORMS,
    "activation": "hidden_activation",
    "scaled_embedding": True,
    "windows": "most",
}
PLUS_ONE = {"norm": "rms_plus_one", "norm_placement": "both"}

# `save` takes the first that can say a model.
FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        OPTIONS | ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        OPTIONS,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        OPTIONS,
        always={"qkv_bias": True},
        defaults=QWEN_DEFAULTS,
        windows="last",
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        OPTIONS | ATTENTION_BIAS,
        always={"qk_norm": "head"},
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
        windows="last",
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        OPTIONS | ATTENTION_BIAS,
        always={"norm_placement": "post", "qk_norm": "embed"},
        layer=LAYER | POST_NORMS,
        defaults={"rms_norm_eps": 1e-5},
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        OPTIONS
        | ATTENTION_BIAS
        | GEMMA_OPTIONS
        | {"attention_softcap": "attn_logit_softcapping"},
        always=PLUS_ONE,
        defaults=GEMMA_DEFAULTS
        | {
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        **GEMMA,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        OPTIONS
        | ATTENTION_BIAS
        | GEMMA_OPTIONS
        | {"local_rope_theta": "rope_local_base_freq"},
        always=PLUS_ONE | {"qk_norm": "head"},
        defaults=GEMMA_DEFAULTS
        | {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
        },
        # transformers reads this key and does not cap the attention.
        only=ONLY | {"attn_logit_softcapping": (None,)},
        **GEMMA,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        OPTIONS,
        layer=LAYER | PRE_NORMS | FUSED,
        defaults={
            "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 4096,
        },
        windows="all",
        partial_rotary=True,
    ),
)

# Why others are refused that users may expect.
REFUSED = {
    "gemma3": "it has a vision tower; the text models are gemma3_text",
    "jaxkern": "load_native reads it",
    "gpt_oss": "its MLPs are mixtures of experts, and its attention has sinks",
    "mixtral": "its MLPs are mixtures of experts",
    "qwen2_moe": "its MLPs are mixtures of experts",
    "qwen3_moe": "its MLPs are mixtures of experts",
}
