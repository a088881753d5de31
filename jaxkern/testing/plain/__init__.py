"""The ops of jaxkern as one writes them in jnp, with every intermediate in memory.

In float64 (`jax.enable_x64`) they define the ops. In other dtypes they are what a
kernel is compared with, in error and in time. Results of products have the dtype of the
arguments. Softmax, norms, activations and rotations are computed in float32, as a
careful user does.

Examples:
    ```python
    import jax.numpy as jnp
    from jaxkern.testing import plain

    a = jnp.array([[1.0, -4.0, 3.0, 2.0]])
    assert plain.top2(a).tolist() == [[0.0, -4.0, 3.0, 0.0]]
    ```
"""

from .attention import EPSILON as EPSILON
from .attention import attention as attention
from .attention import causal_bias as causal_bias
from .attention import dilated_attention as dilated_attention
from .attention import multihead as multihead
from .attention import rotary as rotary
from .evaluate import cast as cast
from .evaluate import in_float64 as in_float64
from .evaluate import with_gradients as with_gradients
from .masked import SLOPES as SLOPES
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
