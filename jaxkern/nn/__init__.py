"""Flax NNX modules: they own parameters and call jaxkern's ops."""

from ._attention import MultiHeadAttention as MultiHeadAttention
from ._linear import LowRankLinear as LowRankLinear
from ._longnet import LongNet as LongNet
from ._mlp import FlashMLP as FlashMLP
from ._mlp import LowRankReLU2 as LowRankReLU2
from ._mlp import LowRankSwiGLU as LowRankSwiGLU
from ._mlp import SwiGLU as SwiGLU
from ._multi_head_mlp import MultiHeadMLP as MultiHeadMLP
from ._transformer import KVCache as KVCache
from ._transformer import TransformerLM as TransformerLM
