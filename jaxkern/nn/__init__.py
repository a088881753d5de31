"""Flax NNX modules, which own parameters and call the ops of jaxkern."""

from ._attention import MultiHeadAttention as MultiHeadAttention
from ._attention_fn import attention_fn as attention_fn
from ._bilinear import Bilinear as Bilinear
from ._bilinear import MaskedBilinear as MaskedBilinear
from ._cache import KVCache as KVCache
from ._compressed_mlp import CompressedMLP as CompressedMLP
from ._dense_mlp import MLP as MLP
from ._dense_mlp import FlashMLP as FlashMLP
from ._dense_mlp import SwiGLU as SwiGLU
from ._linear import LowRankLinear as LowRankLinear
from ._longnet import LongNet as LongNet
from ._low_rank_mlp import LowRankReLU2 as LowRankReLU2
from ._low_rank_mlp import LowRankSwiGLU as LowRankSwiGLU
from ._masked import MaskedLinear as MaskedLinear
from ._masked import MaskLogits as MaskLogits
from ._masked import mask_sparsity as mask_sparsity
from ._multi_head_mlp import MultiHeadMLP as MultiHeadMLP
from ._packed_mlp import Packed24Linear as Packed24Linear
from ._packed_mlp import Packed24ReLU2 as Packed24ReLU2
from ._packed_mlp import PackedWeight as PackedWeight
from ._quadratic import QuadraticTransformer as QuadraticTransformer
from ._sharding import SHARDING_RULES as SHARDING_RULES
from ._sharding import get_sharding as get_sharding
from ._sharding import make_mesh as make_mesh
from ._sharding import parse_mesh_sizes as parse_mesh_sizes
from ._transformer import TransformerLM as TransformerLM
from ._transformer_options import TransformerConfig as TransformerConfig

__all__ = [
    "Bilinear",
    "CompressedMLP",
    "FlashMLP",
    "KVCache",
    "LongNet",
    "LowRankLinear",
    "LowRankReLU2",
    "LowRankSwiGLU",
    "MLP",
    "MaskLogits",
    "MaskedBilinear",
    "MaskedLinear",
    "MultiHeadAttention",
    "MultiHeadMLP",
    "Packed24Linear",
    "Packed24ReLU2",
    "PackedWeight",
    "QuadraticTransformer",
    "SHARDING_RULES",
    "SwiGLU",
    "TransformerConfig",
    "TransformerLM",
    "attention_fn",
    "get_sharding",
    "make_mesh",
    "mask_sparsity",
    "parse_mesh_sizes",
]
