"""The memory of the host while `load` reads a random Llama of 1.2e9 parameters.

`python tests/models/memory.py FOLDER` writes the checkpoint of 2.5 GB into a new
folder, reads it in another process and prints what that process had at most. On a CPU
the parameters are in the same memory, so they are taken off.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SIZES = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192}
SIZES |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
CONFIG = {"model_type": "llama", "max_position_embeddings": 131_072, **SIZES}
CONFIG |= {"head_dim": 64, "rope_theta": 500_000.0, "tie_word_embeddings": True}
LAYER = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
    "input_layernorm": (2048,),
    "post_attention_layernorm": (2048,),
}


def write(folder: Path) -> None:
    """Write four layers a file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    random, index = np.random.default_rng(0), {}
    for part in range(5):
        names = {
            f"model.layers.{i}.{name}.weight": shape
            for i in range(4 * part, 4 * part + 4)
            for name, shape in LAYER.items()
        }
        if part == 4:
            names = {"model.embed_tokens.weight": (128_256, 2048)}
            names |= {"model.norm.weight": (2048,)}
        file = f"model-{part + 1:05}-of-00005.safetensors"
        tensors = {
            name: random.random(shape, np.float32).astype(ml_dtypes.bfloat16)
            for name, shape in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    text = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def measure(folder: str) -> None:
    import jax
    from flax import nnx

    from jaxkern import models

    jax.block_until_ready(jax.numpy.zeros(8))
    before, most, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = models.load(folder)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(nnx.state(model))
    own = sum(leaf.nbytes for leaf in leaves)
    layer = 2 * sum(int(np.prod(shape)) for shape in LAYER.values())
    print(f"{sum(leaf.size for leaf in leaves):.2e} parameters in {seconds:.0f} s")
    print(f"{'before':>20} {before / 2**20:8.0f} MiB")
    print(f"{'parameters':>20} {own / 2**20:8.0f} MiB")
    print(f"{'one layer':>20} {layer / 2**20:8.0f} MiB")
    print(f"{'at most beside these':>20} {(most[0] - before - own) / 2**20:8.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(sys.argv[2])
    else:
        write(Path(sys.argv[1]))
        subprocess.run([sys.executable, __file__, "--measure", sys.argv[1]], check=True)
