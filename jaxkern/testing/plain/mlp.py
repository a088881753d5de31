"""Multi-layer perceptrons, in which each matmul's result is rounded once."""

import jax
import jax.numpy as jnp

from ..._core.activations import ACTIVATIONS
from .rounding import activate
from .sparsity import keep_all, unpack


def _silu_gate(gate, up):
    return jax.nn.silu(gate) * up


def swiglu(x, w_gate, w_up, w_down):
    r"""Compute a SwiGLU.

    $$(\mathrm{silu}(x W_\mathrm{gate}) \odot x W_\mathrm{up})\, W_\mathrm{down}$$

    Args:
        x: (..., d_in).
        w_gate: (d_in, hidden).
        w_up: (d_in, hidden).
        w_down: (hidden, d_out).

    References:
        https://arxiv.org/abs/2002.05202, eq. 6.
    """
    return activate(_silu_gate, x @ w_gate, x @ w_up) @ w_down


def low_rank_swiglu(x, gate, up, down):
    r"""Compute `swiglu` with low-rank weights, multiplying from left to right.

    $$(\mathrm{silu}(x G_1 G_2) \odot x U_1 U_2)\, D_1 D_2$$

    Args:
        x: (..., d_in).
        gate: The pair $G_1$, $G_2$ of factors.
        up: The pair $U_1$, $U_2$ of factors.
        down: The pair $D_1$, $D_2$ of factors.
    """
    z = (x @ gate[0]) @ gate[1], (x @ up[0]) @ up[1]
    return (activate(_silu_gate, *z) @ down[0]) @ down[1]


def relu2(x, up, down, *, select=keep_all):
    r"""Compute a low-rank MLP with squared ReLU, multiplying from left to right.

    $$\mathrm{select}(\mathrm{relu}(x U_1 U_2)^2)\, D_1 D_2$$

    Args:
        x: (tokens, d_in).
        up: The pair $U_1$, $U_2$ of factors.
        down: The pair $D_1$, $D_2$ of factors.
        select: Which hidden features are kept: `keep_all`, `static`, `top2` or `soft`.
    """
    hidden = activate(lambda z: jax.nn.relu(z) ** 2, (x @ up[0]) @ up[1])
    return (select(hidden) @ down[0]) @ down[1]


def pruned(x, up, down):
    """Compute `relu2` with 2:4-sparse factors, which are packed and transposed.

    Args:
        x: (tokens, d_in).
        up: A pair of `Packed24`, each of a transposed factor.
        down: A pair of `Packed24`, each of a transposed factor.
    """
    up, down = ([unpack(factor).T for factor in pair] for pair in (up, down))
    return relu2(x, up, down)


def flash_mlp(x, w1, w2, w_gate=None, *, activation: str = "silu"):
    r"""Compute one MLP for each head $h$.

    $$\mathrm{act}(x_h W_{1h})\, W_{2h}$$

    With `w_gate` it is $(\mathrm{act}(x_h W_{\mathrm{gate}\,h}) \odot x_h W_{1h})\,
    W_{2h}$.

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
