"""The language model's options: its architecture as data, and what follows from it."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from typing import Any, TypedDict, get_args

from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh

from .._attention.rotary import Pairs, check_rotary_dim
from .._attention.rotary_scaling import RotaryScaling, check_scaling
from .._core.activations import ActivationName, get_activation
from .._core.checks import check_flag, check_integer, check_number, raise_unknown
from ._attention_checks import QKNorm, check_heads
from ._common import check_callable
from ._dense_mlp import MLP, SwiGLU
from ._norms import NormKind
from ._transformer_block import LayerKind, NormPlacement, linear_init

OP = "TransformerLM"
INTEGERS = ("vocab_size", "context_length", "embed_dim", "num_layers", "num_heads")
INTEGERS += ("hidden_dim", "num_kv_heads", "head_dim", "rotary_dim", "window")
INTEGERS += ("full_attention_every",)
NUMBERS = ("rope_theta", "norm_epsilon", "local_rope_theta", "embedding_scale")
NUMBERS += ("attention_scale", "attention_softcap", "logit_softcap")
FLAGS = ("tie_embeddings", "qkv_bias", "out_bias", "mlp_bias", "gated_mlp")
FLAGS += ("attention_sinks",)


@dataclass(frozen=True)
class TransformerConfig:
    """The architecture of a `TransformerLM`.

    It has the arguments of `TransformerLM` that can be said as data, and their
    defaults, which are LLaMA's. `TransformerLM.from_config` makes a model of it, and a
    model keeps its own as `config`. The arguments from `head_dim` on say what other
    families do, and may be mixed; mixtures of experts are not among them. Two configs
    with equal arguments are equal and have one hash, and `dataclasses.replace` changes
    some of them.

    Args:
        vocab_size: The number of different tokens.
        context_length: The length of the longest sequence.
        embed_dim: The number of features of a token.
        num_layers: The number of blocks.
        num_heads: The number of heads of the query.
        hidden_dim: The hidden size of the MLP.
        rope_theta: The base of the rotary frequencies.
        num_kv_heads: The number of heads of key and value, a divisor of `num_heads`;
            None for as many.
        tie_embeddings: Use the embeddings as the head, too, as Gemma and the small
            models of Llama 3.2 and Qwen do. They then start as the head would.
        head_dim: The size of a head; None for embed_dim / num_heads. Mistral Nemo, Qwen
            3 and Gemma have another.
        norm: "rms" for RMSNorm, "rms_plus_one" for RMSNorm by 1 + scale (Gemma),
            "layer" for LayerNorm with scale and bias (StarCoder 2, GPT-NeoX).
        norm_epsilon: The number that is added to the mean square. It is 1e-6 in LLaMA
            1, Qwen, OLMo 2 and Gemma.
        norm_placement: "pre" normalizes the input of attention and MLP, "post" their
            output (OLMo 2), and "both" both, with four norms a block (Gemma 2 and 3).
        qk_norm: Normalize query and key before they are rotated, "head" over the
            features of each head (Qwen 3, Gemma 3) or "embed" over those of all heads
            (OLMo 2); None does not.
        qkv_bias: Add biases to query, key and value (Qwen 2 and 2.5, StarCoder 2).
        out_bias: Add a bias to the output of the attention (StarCoder 2).
        mlp_bias: Add biases in the MLP (StarCoder 2).
        activation: The activation of the MLP, as in `MLP`. "gelu" is the tanh form of
            Gemma.
        gated_mlp: Multiply the activated layer by a second product; False for StarCoder
            2 and GPT-NeoX.
        rope_pairs: As in `jaxkern.rotary_embedding`. The published weights of all
            families named here have "halves".
        rotary_dim: The number of rotated features of a head; None for all. It is 3/4 of
            them in Phi-4-mini and 1/4 in GPT-NeoX.
        rope_scaling: A change of the rotary frequencies for long contexts (Llama 3.1,
            Gemma 3, Phi-3, Qwen).
        local_rope_theta: The `rope_theta` of the layers with a window, without
            `rope_scaling`, where others have none; None for that of the others. Gemma
            3.
        embedding_scale: Multiply the embeddings by it, rounded to `dtype`; sqrt(
            embed_dim) in Gemma.
        attention_scale: The factor of the logits of attention; None for head_dim **
            -0.5. Gemma 2 and 3.
        attention_softcap: Replace each logit s of attention by c tanh(s / c) of this c.
            Gemma 2 has 50. Such attention runs in XLA.
        attention_sinks: Add a logit that is learned and has no value to the softmax of
            each head, so that a head may attend to little (gpt-oss). It starts at 0.
        logit_softcap: The same for the logits of the model. Gemma 2 has 30.
        window: Each query sees the last `window` tokens, its own included; None for all
            (Mistral, Phi-3, Gemma 2 and 3).
        full_attention_every: Layers n - 1, 2 n - 1, ... of this n have no window: 2 for
            Gemma 2, 6 for Gemma 3. None gives a window to all layers.

    Raises:
        TypeError: A number is not a number, a flag is neither True nor False, or
            `rope_scaling` is not a `RotaryScaling`.
        ValueError: A size is not a positive integer; `num_heads` does not divide
            `embed_dim` and there is no `head_dim`; the number of rotated features is
            odd; `num_kv_heads` does not divide `num_heads`; a number is not positive
            and finite; or a name is unknown.

    Examples:
        ```python
        from dataclasses import replace
        from jaxkern import nn

        config = nn.TransformerConfig(
            16, 8, embed_dim=8, num_layers=1, num_heads=2, hidden_dim=16
        )
        print(config.rope_theta, replace(config, window=4).window)
        ```
        ```text
        10000.0 4
        ```

    References:
        LLaMA, section 2.2: https://arxiv.org/abs/2302.13971.
    """

    vocab_size: int
    context_length: int
    _: KW_ONLY
    embed_dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    rope_theta: float = 1e4
    num_kv_heads: int | None = None
    tie_embeddings: bool = False
    head_dim: int | None = None
    norm: NormKind = "rms"
    norm_epsilon: float = 1e-5
    norm_placement: NormPlacement = "pre"
    qk_norm: QKNorm | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: ActivationName = "silu"
    gated_mlp: bool = True
    rope_pairs: Pairs = "interleaved"
    rotary_dim: int | None = None
    rope_scaling: RotaryScaling | None = None
    local_rope_theta: float | None = None
    embedding_scale: float | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    logit_softcap: float | None = None
    window: int | None = None
    full_attention_every: int | None = None

    def __post_init__(self):
        self._heads()
        # Python's numbers, so that a config equals the one that a file gives.
        for name in INTEGERS:
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_integer(OP, name, given))
        for name in NUMBERS:
            if (given := getattr(self, name)) is not None:
                check_number(OP, name, given, positive=True)
                object.__setattr__(self, name, float(given))
        _check_names(self)
        check_flag(OP, **{name: getattr(self, name) for name in FLAGS})
        # The check of the window and of the rotary options.
        _ = self.layer_kinds

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "TransformerConfig":
        """Return the config of those of the arguments that are its own."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def heads(self) -> tuple[int, int, int]:
        """The numbers of heads of query and of key, and the size of a head."""
        return self._heads()[1:]

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers, in the order in which they repeat."""
        return _layer_kinds(self)

    def _heads(self) -> tuple[int, int, int, int]:
        sizes = self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim
        return check_heads(OP, *sizes)


class ModelOptions(TypedDict, total=False):
    """The arguments of `TransformerLM` that are no architecture, all but `rngs`."""

    attention_fn: Callable[..., Any] | None
    mlp: Callable[..., nnx.Module] | None
    dtype: Dtype | None
    param_dtype: Dtype
    remat: bool
    scan_layers: bool
    mesh: Mesh | None


def _check_names(config: TransformerConfig) -> None:
    """Check that each name is known."""
    for name, valid in [
        ("norm", get_args(NormKind)),
        ("norm_placement", get_args(NormPlacement)),
        ("qk_norm", (None, *get_args(QKNorm))),
        ("rope_pairs", get_args(Pairs)),
    ]:
        if (got := getattr(config, name)) not in valid:
            raise_unknown(OP, name, got, valid)
    get_activation(OP, config.activation)


def _layer_kinds(config: TransformerConfig) -> tuple[LayerKind, ...]:
    kind = LayerKind(
        config.window,
        config.rope_theta,
        config.rope_pairs,
        config.rotary_dim,
        config.rope_scaling,
    )
    local_rope_theta, every = config.local_rope_theta, config.full_attention_every
    turned = dim = config.heads[-1]
    if kind.rotary_dim is not None:
        turned = check_rotary_dim(OP, kind.rotary_dim, dim)
    elif dim % 2:
        raise ValueError(
            f"{OP}: embed_dim / num_heads or head_dim must be even, for rotary "
            f"positions, got {dim}"
        )
    if kind.scaling is not None:
        check_scaling(OP, "rope_scaling", kind.scaling, kind.rope_theta, turned // 2)
    if kind.window is None:
        given = {"local_rope_theta": local_rope_theta, "full_attention_every": every}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{OP}: {name} must be None without a window, got {value}"
                )
        return (kind,)
    if every is None:
        if local_rope_theta is not None:
            raise ValueError(
                f"{OP}: local_rope_theta must be None without full_attention_every, "
                f"where rope_theta is that of all layers, got {local_rope_theta}"
            )
        return (kind,)
    check_integer(OP, "full_attention_every", every, least=2)
    local = kind
    if local_rope_theta is not None:
        local = kind._replace(rope_theta=local_rope_theta, scaling=None)
    return (*(local,) * (every - 1), kind._replace(window=None))


def check_capped(
    attention_fn: Any, mesh: Mesh | None, config: TransformerConfig
) -> None:
    """Check that a window or a softcap goes with the attention and the mesh."""
    for name in ("window", "attention_softcap"):
        value = getattr(config, name)
        if value is None:
            continue
        if attention_fn is not None:
            raise ValueError(
                f"{OP}: {name} must be None with an attention_fn, got {value}"
            )
        if mesh is not None and mesh.shape["context"] > 1:
            raise ValueError(
                f"{OP}: {name} must be None for context={mesh.shape['context']}, where "
                f"tokens go round in ring_attention, got {value}"
            )


def choose_mlp(mlp: Any, config: TransformerConfig) -> Callable[..., nnx.Module]:
    """Return what makes the MLP of a block."""
    activation, gated, use_bias = config.activation, config.gated_mlp, config.mlp_bias
    options = {"activation": activation, "gated": gated, "use_bias": use_bias}
    default = {"activation": "silu", "gated": True, "use_bias": False}
    if mlp is None:
        if options == default:
            return partial(SwiGLU, kernel_init=linear_init)
        return partial(MLP, kernel_init=linear_init, **options)
    check_callable(OP, "mlp", mlp)
    if options != default:
        raise ValueError(
            f"{OP}: activation, gated_mlp and mlp_bias must be left out with an mlp of "
            f"your own, got {activation!r}, {gated} and {use_bias}"
        )
    return mlp
