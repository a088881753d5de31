"""Train attention over a sequence that is split among devices.

    python examples/long_context.py            on a CPU, split into 8 devices

If there are several GPUs, these are used. On several machines, start the program on
each after `jax.distributed.initialize()`. Every device holds a part of the tokens, in
the zigzag order that gives all devices the same causal work, and keys and values go
round. So each device needs less memory if there are more of them. A student layer
learns what a teacher layer computes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from _program import refuse_options, run_program
from flax import nnx

import jaxkern

LONG, SEQ, EMBED, HEADS, STEPS = 65536, 1024, 64, 4, 30
TOKENS = jax.P(None, "context")


def make_layer(seed: int):
    ring = partial(
        jaxkern.ring_attention, axis_name="context", is_causal=True, layout="zigzag"
    )
    return nnx.split(
        jaxkern.nn.MultiHeadAttention(
            EMBED, HEADS, attention_fn=ring, rngs=nnx.Rngs(seed)
        )
    )


def make_gradients(graph, mesh):
    """Return a program for the loss over all devices' tokens and its gradient."""

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(jax.P(), TOKENS, TOKENS), out_specs=jax.P()
    )
    def loss(state, x, target):
        error = nnx.merge(graph, state)(x) - target
        return jax.lax.pmean(jnp.mean(error**2), "context")

    return jax.jit(jax.value_and_grad(loss))


def make_mesh(devices: int):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("context",), axis_types=auto)


def print_memory(graph, state) -> None:
    """Print the memory of a compiled step, without running it."""
    for devices in (1, 2, 4, 8):
        if devices > jax.device_count():
            break
        mesh = make_mesh(devices)
        sharding = jax.NamedSharding(mesh, TOKENS)
        x = jax.ShapeDtypeStruct((1, LONG, EMBED), jnp.float32, sharding=sharding)
        program = make_gradients(graph, mesh).lower(state, x, x).compile()
        memory = program.memory_analysis()
        assert memory is not None, "XLA tells it of CPUs and GPUs"
        size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        print(f"{devices} devices, {LONG} tokens: {size / 2**20:4.0f} MiB on each")


def train(graph, state) -> list[float]:
    mesh = make_mesh(jax.device_count())
    # Tokens and their positions are permuted once, when they are loaded.
    order, _ = jaxkern.ring_permutation(SEQ, mesh.size, "zigzag")
    tokens = jax.random.normal(jax.random.key(2), (1, SEQ, EMBED))[:, order]
    x = jax.device_put(tokens, jax.NamedSharding(mesh, TOKENS))
    teacher = jax.shard_map(
        lambda state, x: nnx.merge(graph, state)(x),
        mesh=mesh,
        in_specs=(jax.P(), TOKENS),
        out_specs=TOKENS,
    )
    target = jax.jit(teacher)(make_layer(1)[1], x)
    gradients, optimizer = make_gradients(graph, mesh), optax.adam(0.01)

    @jax.jit
    def step(state, moments, x, target):
        loss, gradient = gradients(state, x, target)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(state, updates), moments, loss

    moments, losses = optimizer.init(state), []
    for i in range(STEPS):
        state, moments, loss = step(state, moments, x, target)
        losses.append(float(loss))
        if i % 10 == 0 or i == STEPS - 1:
            print(f"step {i:2}: loss {losses[-1]:.4f}")
    return losses


def main() -> list[float]:
    graph, state = make_layer(0)
    print_memory(graph, state)
    return train(graph, state)


if __name__ == "__main__":
    refuse_options(__doc__)
    # This has no effect if there is a GPU.
    jax.config.update("jax_num_cpu_devices", 8)
    run_program(main)
