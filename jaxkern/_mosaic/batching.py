"""What `vmap` makes of kernels."""

import jax
import jax.numpy as jnp


def over_heads(kernel):
    """Under `vmap` the new axis joins the heads; what lacks it is repeated."""
    kernel = jax.custom_batching.custom_vmap(kernel)

    @kernel.def_vmap
    def fold(size, is_batched, *args):
        args = [
            a if batched else jnp.broadcast_to(a, (size, *a.shape))
            for a, batched in zip(args, is_batched, strict=True)
        ]
        outs = kernel(*(a.reshape(-1, *a.shape[2:]) for a in args))
        outs = jax.tree.map(lambda o: o.reshape(size, -1, *o.shape[1:]), outs)
        return outs, jax.tree.map(lambda _: True, outs)

    return kernel
