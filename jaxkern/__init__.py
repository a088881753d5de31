"""Fused kernels and Flax NNX modules for efficient transformer blocks."""

from . import nn as nn
from ._attention import attention as attention
from ._attention import merge_attention as merge_attention
from ._block_mask import BlockMask as BlockMask
from ._block_sparse import block_sparse_attention as block_sparse_attention
from ._cross_entropy import cross_entropy as cross_entropy
from ._dilated import dilated_attention as dilated_attention
from ._estimators import binary_concrete as binary_concrete
from ._estimators import gumbel_softmax as gumbel_softmax
from ._estimators import reinmax as reinmax
from ._estimators import reinmax_categorical as reinmax_categorical
from ._estimators import seed_reinmax as seed_reinmax
from ._estimators import straight_through as straight_through
from ._flash_mlp import flash_mlp as flash_mlp
from ._masked import masked_bilinear as masked_bilinear
from ._masked import masked_matmul as masked_matmul
from ._mlp import low_rank_matmul as low_rank_matmul
from ._mlp import low_rank_relu2 as low_rank_relu2
from ._mlp import low_rank_swiglu as low_rank_swiglu
from ._mlp import swiglu as swiglu
from ._packed_2_4 import Packed24 as Packed24
from ._packed_mask import PackedMask as PackedMask
from ._packed_mask import pack_mask as pack_mask
from ._packed_mask import unpack_mask as unpack_mask
from ._packed_mlp import packed_relu2 as packed_relu2
from ._ring import context_parallel_attention as context_parallel_attention
from ._ring import ring_attention as ring_attention
from ._ring import ring_permutation as ring_permutation
from ._rotary import rotary_embedding as rotary_embedding
from ._sparsity import matmul_2_4 as matmul_2_4
from ._sparsity import pack_2_4 as pack_2_4
from ._sparsity import sparsify_2_4 as sparsify_2_4
from ._sparsity import unpack_2_4 as unpack_2_4

__version__ = "0.1.0"
