"""Fused kernels and Flax NNX modules for efficient transformer blocks.

Functions take and return JAX arrays, and run on every device. Most of them take
`implementation=`: "xla" is compiled `jax.numpy`, "mosaic_gpu" is a fused kernel for
the H100 and H200 in bfloat16 or float16, and None picks one of them by shapes, dtypes
and device. A named implementation runs or raises.

- Attention: `attention`, `block_sparse_attention` with a `BlockMask`,
  `dilated_attention` with a `Dilation`, `ring_attention` and
  `context_parallel_attention` over many devices, `merge_attention`.
- MLPs: `flash_mlp`, `swiglu`, `low_rank_swiglu`, `low_rank_relu2`, `low_rank_matmul`.
- 2:4 sparsity: `sparsify_2_4`, `pack_2_4`, `unpack_2_4`, `matmul_2_4`.
- Masks that learn: `masked_matmul`, `masked_bilinear`, and estimators such as
  `straight_through` and `reinmax`.
- `cross_entropy` and `rotary_embedding`.

`jaxkern.nn` has modules that own parameters and call these functions, and
`jaxkern.models` reads and writes open checkpoints.
`jaxkern.testing`, which must be imported, tests Pallas kernels without a GPU.
"""

from . import models as models
from . import nn as nn
from ._attention.block_mask.mask import BlockMask as BlockMask
from ._attention.block_sparse import block_sparse_attention as block_sparse_attention
from ._attention.dense import attention as attention
from ._attention.dense import merge_attention as merge_attention
from ._attention.dilated import dilated_attention as dilated_attention
from ._attention.dilation import Dilation as Dilation
from ._attention.ring import context_parallel_attention as context_parallel_attention
from ._attention.ring import ring_attention as ring_attention
from ._attention.ring import ring_permutation as ring_permutation
from ._attention.rotary import rotary_embedding as rotary_embedding
from ._attention.rotary_scaling import RotaryScaling as RotaryScaling
from ._cross_entropy import cross_entropy as cross_entropy
from ._masked.estimators import binary_concrete as binary_concrete
from ._masked.estimators import gumbel_softmax as gumbel_softmax
from ._masked.estimators import reinmax as reinmax
from ._masked.estimators import reinmax_categorical as reinmax_categorical
from ._masked.estimators import straight_through as straight_through
from ._masked.masked import masked_bilinear as masked_bilinear
from ._masked.masked import masked_matmul as masked_matmul
from ._masked.packed import PackedMask as PackedMask
from ._masked.packed import pack_mask as pack_mask
from ._masked.packed import unpack_mask as unpack_mask
from ._mlp.flash_mlp import flash_mlp as flash_mlp
from ._mlp.mlp import low_rank_matmul as low_rank_matmul
from ._mlp.mlp import low_rank_relu2 as low_rank_relu2
from ._mlp.mlp import low_rank_swiglu as low_rank_swiglu
from ._mlp.mlp import swiglu as swiglu
from ._sparsity.matmul import matmul_2_4 as matmul_2_4
from ._sparsity.packed import Packed24 as Packed24
from ._sparsity.packed import pack_2_4 as pack_2_4
from ._sparsity.packed import unpack_2_4 as unpack_2_4
from ._sparsity.select import sparsify_2_4 as sparsify_2_4

__all__ = [
    "BlockMask",
    "Dilation",
    "Packed24",
    "PackedMask",
    "RotaryScaling",
    "attention",
    "binary_concrete",
    "block_sparse_attention",
    "context_parallel_attention",
    "cross_entropy",
    "dilated_attention",
    "flash_mlp",
    "gumbel_softmax",
    "low_rank_matmul",
    "low_rank_relu2",
    "low_rank_swiglu",
    "masked_bilinear",
    "masked_matmul",
    "matmul_2_4",
    "merge_attention",
    "models",
    "nn",
    "pack_2_4",
    "pack_mask",
    "reinmax",
    "reinmax_categorical",
    "ring_attention",
    "ring_permutation",
    "rotary_embedding",
    "sparsify_2_4",
    "straight_through",
    "swiglu",
    "unpack_2_4",
    "unpack_mask",
]

__version__ = "0.1.0"
