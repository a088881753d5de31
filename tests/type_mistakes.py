"""A user's program with ten mistakes, which mypy and pyright must find.

`make lint` runs both on it, and nothing executes it. Each line below the heading has a
mistake, and a comment that hides the error from both. Without the error, the comment is
itself reported as unnecessary.
"""
# pyright: reportUnnecessaryTypeIgnoreComment=true

import jax
import jax.numpy as jnp
from flax import nnx

import jaxkern

x = jnp.ones((2, 64, 8, 16))
w = jnp.ones((16, 16))
labels = jnp.ones((2, 64, 8), jnp.int32)
mask = jaxkern.BlockMask.causal(64, 64, block_size=16)
window = mask & jaxkern.BlockMask.local_window(64, 64, window=8, block_size=16)

# These lines are right, and have neither an error nor a comment.
out: jax.Array = jaxkern.attention(x, x, x, is_causal=True)
with_lse: bool = bool(x.shape[0])
either = jaxkern.attention(x, x, x, return_lse=with_lse)
out, lse = jaxkern.block_sparse_attention(x, x, x, mask=window, return_lse=True)
merged: tuple[jax.Array, jax.Array] = jaxkern.merge_attention(out, lse, out, lse)
product: jax.Array = jaxkern.matmul_2_4(jaxkern.pack_2_4(x), w)
hidden: jax.Array = jaxkern.nn.SwiGLU(16, 48, rngs=nnx.Rngs(0))(x)
losses: jax.Array = jaxkern.cross_entropy(x, w, labels, z_loss=1e-4, chunk=4)
losses, lse = jaxkern.cross_entropy(x, w, labels, return_lse=True)

# Mistakes.
out = jaxkern.attention(x, x, x, implementation="pallas")  # type: ignore[call-overload]
out = jaxkern.attention(x, x, x, return_lse=True)  # type: ignore[assignment]
a, b, c = jaxkern.attention(x, x, x, return_lse=True)  # type: ignore[misc]
out = jaxkern.attention(x, x, x, None)  # type: ignore[call-overload]
out = jaxkern.block_sparse_attention(x, x, x, mask=x > 0)  # type: ignore[call-overload]
window = mask & (x > 0)  # type: ignore[operator]
out = jaxkern.swiglu(x, None, w, w)  # type: ignore[arg-type]
losses = jaxkern.cross_entropy(x, w, labels, chunks=4)  # type: ignore[call-overload]
product = jaxkern.matmul_2_4(x, w)  # type: ignore[arg-type]
mlp = jaxkern.nn.SwiGLU(16, 48)  # type: ignore[call-arg]
