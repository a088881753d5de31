"""Compile Mosaic GPU kernels for sm_90a, with or without a GPU, and count.

JAX lowers on the CPU to a module a kernel; the CUDA plugin compiles it all the way to
machine code in a process of its own, against a stub of the driver that also tells how
much shared memory is asked for. Counts are static: a loop's body counts once.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxkern._mosaic.base import SMEM_BYTES

HERE = Path(__file__).parent
TIMEOUT = 300
COUNTED = {
    "hgmma": r"\bHGMMA\b",
    "hgmma_sparse": r"\bHGMMA\.SP\b",
    "mufu": r"\bMUFU\b",
    "instructions": r".",
}
INSTALL = "run `make kernels`, which installs it"


class Missing(Exception):
    """A tool or package that compiling needs."""


def _search(*patterns: str) -> str | None:
    """The first match in Python's folders or the CUDA toolkit's."""
    roots = [*sys.path, "/usr/local/cuda", os.environ.get("CUDA_HOME", "")]
    for root in filter(None, roots):
        for pattern in patterns:
            found = sorted(glob.glob(os.path.join(root, pattern)))
            if found:
                return found[-1]
    return None


def requirements() -> tuple[str, str | None]:
    """The CUDA plugin, and the disassembler if there is one.

    Raises:
        Missing: something without which nothing compiles.
    """
    plugin = _search("jax_plugins/xla_cuda*/xla_cuda_plugin.so")
    if plugin is None:
        raise Missing(f"the package jax-cuda13-pjrt is not installed: {INSTALL}")
    wanted = {
        "ptxas (nvidia-cuda-nvcc)": ("nvidia/cu*/bin/ptxas", "bin/ptxas"),
        "libdevice (nvidia-nvvm)": ("nvidia/cu*/nvvm/libdevice/*", "nvvm/libdevice/*"),
        "libcudart (nvidia-cuda-runtime)": (
            "nvidia/cu*/lib/libcudart*",
            "lib*/libcudart*",
        ),
    }
    for name, patterns in wanted.items():
        if _search(*patterns) is None:
            raise Missing(f"{name} is not installed: {INSTALL}")
    if not _c_compiler():
        raise Missing("a C compiler (gcc or cc) is not installed")
    disassembler = _search("nvidia/cu*/bin/nvdisasm", "bin/nvdisasm")
    return plugin, shutil.which("nvdisasm") or disassembler


def _c_compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


def build_stub(folder: Path) -> None:
    """libcuda.so.1 in the folder."""
    target = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{target.name}"]
    command = [_c_compiler() or "cc", *options, "-o", target, HERE / "cuda_stub.c"]
    subprocess.run(command, check=True, capture_output=True)


def lower(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[bytes]:
    """The modules of the kernels that `fn` launches."""
    lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
    module: Any = lowered.compiler_ir()
    found = []

    def visit(operation):
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    inner = inner.operation
                    attributes = inner.attributes
                    is_call = inner.name == "stablehlo.custom_call"
                    if is_call and "mosaic_gpu" in str(attributes["call_target_name"]):
                        names = ("mhlo.backend_config", "backend_config")
                        name = next(name for name in names if name in attributes)
                        found.append(attributes[name]["module"].value_bytes)
                    visit(inner)

    with module.context:
        visit(module.operation)
    return found


def compile_module(
    module: bytes, plugin: str, disassembler: str | None, stub: Path
) -> dict[str, Any]:
    """What one kernel needs.

    Raises:
        RuntimeError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "module").write_bytes(module)
        environment = os.environ | {
            "LD_LIBRARY_PATH": f"{stub}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "KERNELS_CUBIN": str(folder / "cubin"),
            "KERNELS_SMEM": str(folder / "smem"),
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        command = [sys.executable, "-S", HERE / "_kernel_process.py"]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, plugin, folder / "module"],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
        seconds = time.perf_counter() - start
        output = done.stdout + "\n" + done.stderr
        if done.returncode:
            marks = ("error", "FAILED", "INTERNAL", "INVALID")
            lines = [
                s.strip() for s in output.splitlines() if any(m in s for m in marks)
            ]
            raise RuntimeError(
                f"does not compile: {' | '.join(lines[:3]) or output[-300:]}"
            )
        smem = folder / "smem"
        row = _count_ptx(output) | {
            "compile_s": seconds,
            "smem_bytes": int(smem.read_text()) if smem.exists() else 0,
        }
        if disassembler and (folder / "cubin").exists():
            row |= _count_sass(disassembler, folder / "cubin")
        return row


def _count_ptx(output: str) -> dict[str, Any]:
    def number(pattern: str) -> int:
        found = re.search(pattern, output)
        if not found:
            raise RuntimeError(f"ptxas printed nothing like {pattern!r}")
        return int(found.group(1))

    return {
        "registers": number(r"Used (\d+) registers"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "spill_stores_bytes": number(r"(\d+) bytes spill stores"),
        "spill_loads_bytes": number(r"(\d+) bytes spill loads"),
        "barriers": number(r"used (\d+) barriers"),
        "wgmma": len(re.findall(r"wgmma\.mma_async", output)),
        "serialized": bool(re.search(r"wgmma.*serialized", output)),
    }


def _count_sass(disassembler: str, cubin: Path) -> dict[str, int]:
    # Without an analysis of the data's flow, which shows in nothing that is counted.
    command = [disassembler, "-c", "-ndf", cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [s for s in text.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", s)]
    return {
        name: sum(bool(re.search(pattern, s)) for s in lines)
        for name, pattern in COUNTED.items()
    }


def problems(row: dict[str, Any]) -> str | None:
    """Why a kernel like this is not to be shipped."""
    if row["spill_stores_bytes"] or row["spill_loads_bytes"]:
        spilled = row["spill_stores_bytes"], row["spill_loads_bytes"]
        return f"spills registers: {spilled[0]} bytes stored, {spilled[1]} loaded"
    if row["serialized"]:
        return "wgmmas run one after the other, for want of registers"
    if row["smem_bytes"] > SMEM_BYTES:
        return f"needs {row['smem_bytes']} bytes of shared memory of {SMEM_BYTES}"
    return None
