"""Our ops as one writes them in jnp: what a kernel is held to, and what it must beat.

They compute in the dtype of their arguments, but for what a careful user computes in
float32, and hold every intermediate. In float64 (`jax.enable_x64`) they define the ops.

>>> import jax.numpy as jnp
>>> from jaxkern.testing import plain
>>> print(plain.top2(jnp.array([[1.0, -4.0, 3.0, 2.0]])))
[[ 0. -4.  3.  0.]]
"""

from .attention import attention as attention
from .attention import causal_bias as causal_bias
from .attention import rotary as rotary
from .masked import masked_bilinear as masked_bilinear
from .masked import masked_matmul as masked_matmul
from .mlp import flash_mlp as flash_mlp
from .mlp import low_rank_swiglu as low_rank_swiglu
from .mlp import pruned as pruned
from .mlp import relu2 as relu2
from .mlp import swiglu as swiglu
from .rounding import activate as activate
from .sparsity import groups as groups
from .sparsity import keep_all as keep_all
from .sparsity import soft as soft
from .sparsity import static as static
from .sparsity import top2 as top2
from .sparsity import unpack as unpack
