"""A SwiGLU, its low-rank form, and a 2:4-sparse MLP, in ten lines."""

import jax
from flax import nnx

import jaxkern

x = jax.random.normal(jax.random.key(0), (4, 512, 512))  # (batch, seq, embed)
full = jaxkern.nn.SwiGLU(512, 1376, rngs=nnx.Rngs(0))
low, errors = jaxkern.nn.LowRankSwiGLU.from_full_rank(full, rank=128)
sparse = jaxkern.nn.LowRankReLU2(512, 2064, rank=128, sparsity="2:4", rngs=nnx.Rngs(1))
for mlp in (full, low, sparse):
    loss, gradients = nnx.value_and_grad(lambda mlp: (mlp(x) ** 2).mean())(mlp)
    size = sum(g.size for g in jax.tree.leaves(gradients))
    print(f"{type(mlp).__name__:<14}{size:>9} parameters, loss {loss:.4f}")
print("relative error of each weight:", {k: f"{e:.2f}" for k, e in errors.items()})
