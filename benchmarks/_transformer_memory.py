"""What a device must hold to train a large language model, by compiling it only."""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkern.nn import TransformerLM, get_sharding, make_mesh, parse_mesh_sizes

from ._report import make_console, print_table, table
from ._transformer_programs import make_adam, make_step

GPUS = {"H100": 80e9, "H200": 141e9}
MOST_DEVICES = 512
SIZES: dict[str, dict[str, int]] = {
    "2.7B": {
        "vocab_size": 10_000,
        "context_length": 2048,
        "embed_dim": 2560,
        "num_layers": 32,
        "num_heads": 32,
        "hidden_dim": 10_240,
    },
    "70B": {
        "vocab_size": 32_000,
        "context_length": 4096,
        "embed_dim": 8192,
        "num_layers": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
        "hidden_dim": 28_672,
    },
}
MESHES = [
    ("2.7B", 8, "fsdp=8"),
    ("2.7B", 64, "fsdp=64"),
    ("2.7B", 512, "data=8,fsdp=64"),
    ("70B", 8, "fsdp=8"),
    ("70B", 8, "tensor=8"),
    ("70B", 64, "fsdp=64"),
    ("70B", 64, "fsdp=8,tensor=8"),
    ("70B", 512, "fsdp=64,tensor=8"),
    ("70B", 512, "fsdp=32,tensor=8,context=2"),
]
NOTES = """\
Weights and AdamW's two moments are float32, the computation is bfloat16, layers
are computed again in the backward, and each group of devices that share a batch
has one sequence in it, of {contexts}.
Temporaries, gradients among them, are those of XLA's buffers for a CPU, which
widens bfloat16 products and what they read to float32; a GPU's will differ.
GB are 10^9 bytes; s is how long it took to compile. A model fits if
the sum is at most {gpus}, of which JAX takes 75 %
unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    moments: int
    temporaries: int
    compile_s: float

    @property
    def total(self) -> int:
        return self.parameters + self.moments + self.temporaries


def measure(size: str, devices: int, sizes: str) -> Memory:
    """Of a training step of this model, on the first of the devices there are."""
    mesh = make_mesh(**parse_mesh_sizes(sizes), devices=jax.devices()[:devices])
    options: Any = SIZES[size] | {"remat": True, "dtype": jnp.bfloat16, "mesh": mesh}
    make = partial(TransformerLM, **options)
    adam = make_adam()
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    shapes = state, jax.eval_shape(adam.init, state)
    places = get_sharding(shapes, mesh)

    def loss(state, tokens, targets):
        return nnx.merge(graph, state).loss(tokens, targets)

    batch = mesh.shape["data"] * mesh.shape["fsdp"], SIZES[size]["context_length"]
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    ids = jax.ShapeDtypeStruct(batch, jnp.int32, sharding=rows)
    start = time.perf_counter()
    step = jax.jit(
        make_step(loss, adam), donate_argnums=(0, 1), out_shardings=(None, *places)
    )
    compiled = step.lower(*jax.tree.map(_place, shapes, places), ids, ids).compile()
    stats = compiled.memory_analysis()
    assert stats is not None, "XLA tells it of CPUs"
    held = [
        sum(map(_local_bytes, jax.tree.leaves(arrays), jax.tree.leaves(where)))
        for arrays, where in zip(shapes, places, strict=True)
    ]
    seconds = time.perf_counter() - start
    return Memory(held[0], held[1], stats.temp_size_in_bytes, seconds)


def _place(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _local_bytes(array: Any, sharding: Any) -> int:
    shape = sharding.shard_shape(array.shape)
    return math.prod(shape) * jnp.dtype(array.dtype).itemsize


def main() -> int:
    # Also where there is a GPU: it would be one, not 512.
    jax.config.update("jax_platforms", "cpu")
    config: Any = jax.config
    config.update("jax_num_cpu_devices", MOST_DEVICES)
    return print_rows(MESHES)


def print_rows(rows: list[tuple[str, int, str]]) -> int:
    title = "GB a device for a training step, compiled and not run"
    columns = ["", "weights", "AdamW", "temp.", "sum", "fits in", "s"]
    what, models, failed = table(title, columns), [], []
    for size, devices, sizes in rows:
        if size not in models:
            what.add_row(size)
            models.append(size)
        name = f"  {devices}: {sizes}"
        try:
            found = measure(size, devices, sizes)
        # Whatever is wrong with one, the others may do.
        except Exception as error:
            what.add_row(name, *["-"] * 6)
            failed.append(f"{size}{name}: {type(error).__name__}: {error}")
            continue
        parts = found.parameters, found.moments, found.temporaries, found.total
        fits = next((gpu for gpu, most in GPUS.items() if found.total <= most), "-")
        figures = [f"{part / 1e9:.1f}" for part in parts]
        what.add_row(name, *figures, fits, f"{found.compile_s:.0f}")
    console = make_console()
    print_table(console, what)
    contexts = [f"{s['context_length']} tokens ({n})" for n, s in SIZES.items()]
    gpus = " or ".join(f"{most / 1e9:.0f} GB ({gpu})" for gpu, most in GPUS.items())
    console.print(
        NOTES.format(contexts=" or ".join(contexts), gpus=gpus), soft_wrap=True
    )
    for line in failed:
        console.print(f"failed: {line}", markup=False, soft_wrap=True)
    return int(bool(failed))
