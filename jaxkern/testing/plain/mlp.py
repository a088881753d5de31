"""Multi-layer perceptrons, every result of a product rounded once."""

import jax
import jax.numpy as jnp

from ..._core.activations import ACTIVATIONS
from .rounding import activate
from .sparsity import keep_all, unpack


def _silu_gate(gate, up):
    return jax.nn.silu(gate) * up


def swiglu(x, w_gate, w_up, w_down):
    r"""$(\mathrm{silu}(x W_\mathrm{gate}) \odot x W_\mathrm{up})\, W_\mathrm{down}$."""
    return activate(_silu_gate, x @ w_gate, x @ w_up) @ w_down


def low_rank_swiglu(x, gate, up, down):
    """`swiglu` of kernels that are pairs of factors, from left to right."""
    z = (x @ gate[0]) @ gate[1], (x @ up[0]) @ up[1]
    return (activate(_silu_gate, *z) @ down[0]) @ down[1]


def relu2(x, up, down, *, select=keep_all):
    r"""$\mathrm{select}(\mathrm{relu}(x U_1 U_2)^2)\, D_1 D_2$, from left to right.

    Args:
        x: (tokens, d_in).
        up: A pair of factors.
        down: A pair of factors.
        select: One of `keep_all`, `static`, `top2` and `soft`.
    """
    hidden = activate(lambda z: jax.nn.relu(z) ** 2, (x @ up[0]) @ up[1])
    return (select(hidden) @ down[0]) @ down[1]


def pruned(x, up, down):
    """`relu2` of factors that are packed transposed."""
    up, down = ([unpack(factor).T for factor in pair] for pair in (up, down))
    return relu2(x, up, down)


def flash_mlp(x, w1, w2, w_gate=None, *, activation: str = "silu"):
    r"""One MLP a head: $\mathrm{act}(x W_1)\, W_2$.

    With `w_gate` it is $(\mathrm{act}(x W_\mathrm{gate}) \odot x W_1)\, W_2$.

    Args:
        x: (heads, batch, dim).
        w1: (heads, dim, hidden).
        w2: (heads, hidden, dim).
        w_gate: (heads, dim, hidden).
        activation: A name that `jaxkern.flash_mlp` knows.
    """
    value = ACTIVATIONS[activation].value
    up = jnp.einsum("hbd,hde->hbe", x, w1)
    if w_gate is None:
        hidden = activate(value, up)
    else:
        gate = jnp.einsum("hbd,hde->hbe", x, w_gate)
        hidden = activate(lambda gate, up: value(gate) * up, gate, up)
    return jnp.einsum("hbe,hed->hbd", hidden, w2)
