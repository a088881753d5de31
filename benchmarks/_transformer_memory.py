"""Memory of each device that trains a large language model, by compiling it only."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkern.nn import TransformerLM, get_sharding, make_mesh, parse_mesh_sizes

from ._harness import XLA, Case, Row, labels
from ._report import Table, listing
from ._transformer_programs import STEP, make_adam, make_step

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
NOTES = {
    "weights": "float32, as are AdamW's two moments; the computation is bfloat16",
    "layers": "computed again in the backward",
    "batch": "one sequence for each group of devices that share it",
    "temp.": "gradients and temporaries, of XLA's buffers for a CPU, which widens\n"
    "bfloat16 products and what they read to float32; a GPU's will differ",
    "GB": "10^9 bytes; s is how long it took to compile",
    "fits in": "of which JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says\n"
    f"otherwise: {', '.join(f'{n} {most / 1e9:.0f} GB' for n, most in GPUS.items())}",
}
# Columns of a table, and those of a row.
PARTS = {
    "weights": "parameters_bytes",
    "AdamW": "moments_bytes",
    "temp.": "temporaries_bytes",
}


def measure(size: str, devices: int, sizes: str) -> Row:
    """Bytes of one device for a training step of this model, which is not run."""
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
    held.append(stats.temp_size_in_bytes)
    return dict(zip(PARTS.values(), held, strict=True)) | {"compile_s": seconds}


def _place(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _local_bytes(array: Any, sharding: Any) -> int:
    shape = sharding.shard_shape(array.shape)
    return math.prod(shape) * jnp.dtype(array.dtype).itemsize


def start() -> None:
    """Pretend, also where there is a GPU: it would be one device, not 512."""
    jax.config.update("jax_platforms", "cpu")
    config: Any = jax.config
    config.update("jax_num_cpu_devices", MOST_DEVICES)


def cases() -> list[Case]:
    return [
        Case(
            labels("TransformerLM", "", XLA, STEP, "bfloat16", **sizes),
            partial(measure, *sizes.values()),
        )
        for sizes in (
            dict(zip(("size", "devices", "mesh"), m, strict=True)) for m in MESHES
        )
    ]


def total(row: Row) -> float:
    return sum(row.get(part, 0) for part in PARTS.values())


def table(rows: Sequence[Row]) -> Table:
    def gigabytes(part: str) -> Callable[[Row], str]:
        return lambda row: f"{row.get(part, 0) / 1e9:.1f}"

    def fits(row: Row) -> str:
        return next((gpu for gpu, most in GPUS.items() if total(row) <= most), "-")

    columns = {name: gigabytes(part) for name, part in PARTS.items()}
    columns["sum"] = lambda row: f"{total(row) / 1e9:.1f}"
    columns |= {"fits in": fits, "s": lambda row: f"{row.get('compile_s', 0):.0f}"}
    return listing(
        "GB a device for a training step, compiled and not run",
        rows,
        lambda row: f"{row['devices']}: {row['mesh']}",
        columns,
        lambda row: row["size"],
    )
