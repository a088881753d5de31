"""Compile Mosaic GPU kernels for sm_90a, with or without a GPU, and count.

JAX lowers a function on the CPU to one module for each kernel. In a process of its own,
the CUDA plugin compiles the module to machine code. A stub stands for the driver: it
writes the machine code that is loaded, and the shared memory that is asked for, to
files.
"""

import hashlib
import io
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from .._core.checks import raise_unknown
from . import order
from .tools import (
    HERE,
    TOOLS,
    MissingCompiler,
    Tools,
    build_stub,
    last_words,
    run_tool,
    tools,
    try_tool,
)

ARCHITECTURES = ("sm_90a",)


@dataclass(frozen=True)
class CompiledKernel:
    """The resources that one compiled kernel needs, as `compile_for` returns them.

    Counts are static: an instruction in a loop counts once.

    Attributes:
        registers: Registers of one thread at launch.
        stack_bytes: The stack of one thread.
        spill_stores_bytes: Spilled registers that one thread writes to memory.
        spill_loads_bytes: Spilled registers that one thread reads back.
        smem_bytes: Shared memory of one block.
        barriers: Named barriers of the hardware.
        wgmma: Tensor-core instructions in the PTX.
        is_serialized: Whether the compiler lets wgmmas run only one after the other.
        instructions: How often each machine instruction occurs, by its name with all
            modifiers; None without the disassembler.
        seconds: The time that compiling took.
        faults: What is wrong in the order of the kernel's instructions, a sentence
            each: a wgmma or a copy that is not fenced, committed or awaited, or
            warpgroups that ask for more registers than there are.

    Examples:
        ```python
        from jaxkern import testing

        kernel = testing.CompiledKernel(
            registers=168,
            stack_bytes=16,
            spill_stores_bytes=16,
            spill_loads_bytes=20,
            smem_bytes=65536,
            barriers=1,
            wgmma=4,
            is_serialized=False,
            instructions={"HGMMA.64x128x16.F32": 4, "MUFU.EX2": 8},
            seconds=0.5,
        )
        assert kernel.count("MUFU") == 8
        assert kernel.count() == 12
        assert kernel.problem() == "spills registers: 16 bytes stored, 20 loaded"
        ```
    """

    registers: int
    stack_bytes: int
    spill_stores_bytes: int
    spill_loads_bytes: int
    smem_bytes: int
    barriers: int
    wgmma: int
    is_serialized: bool
    instructions: dict[str, int] | None = field(repr=False)
    seconds: float
    faults: tuple[str, ...] = ()

    @property
    def spilled_bytes(self) -> int:
        """The sum of `spill_stores_bytes` and `spill_loads_bytes`."""
        return self.spill_stores_bytes + self.spill_loads_bytes

    def count(self, name: str = "") -> int:
        """Count the machine instructions with this name, such as "MUFU" or "HGMMA.SP".

        Args:
            name: The name, with any number of its modifiers. Without it, all
                instructions are counted.

        Returns:
            How many there are in the machine code.

        Raises:
            MissingCompiler: The disassembler was not installed.
        """
        if self.instructions is None:
            raise MissingCompiler(
                "CompiledKernel.count: nvdisasm (nvidia-cuda-nvdisasm) must be "
                f"installed: {TOOLS}"
            )
        return sum(
            n
            for found, n in self.instructions.items()
            if not name or found == name or found.startswith(f"{name}.")
        )

    def problem(self) -> str | None:
        """Say why this kernel is wrong, slow or does not run.

        Returns:
            The first of its faults, spilled registers, serialized wgmmas or too much
            shared memory, as a sentence; None if there is none.
        """
        if self.faults:
            return self.faults[0]
        if self.spilled_bytes:
            return (
                f"spills registers: {self.spill_stores_bytes} bytes stored, "
                f"{self.spill_loads_bytes} loaded"
            )
        if self.is_serialized:
            return "wgmmas run one after the other, for want of registers"
        # Mosaic is imported when a kernel is first used.
        from .._mosaic.base import SMEM_BYTES

        if self.smem_bytes > SMEM_BYTES:
            return f"needs {self.smem_bytes} bytes of shared memory of {SMEM_BYTES}"
        return None


def compile_for(arch: str, fn: Callable[..., Any], *args: Any) -> CompiledKernel:
    r"""Compile the kernel that `fn(*args)` launches, on a machine that needs no GPU.

    The result says what only a compiler knows: whether the kernel compiles, and the
    registers, spilled bytes, shared memory and instructions it takes. With $r$
    registers a thread and $s$ bytes of shared memory, so many blocks of $w$ threads run
    at once on a multiprocessor of Hopper:

    $$\min(\lfloor 65536 / (r w) \rfloor,\ \lfloor 233472 / (s + 1024) \rfloor)$$

    It needs `pip install 'jaxkern-fused[testing]'`, a C compiler, and JAX's CUDA
    plugin. With a GPU, `pip install 'jax[cuda13]'` brings it. Without one, install the
    plugin apart, since JAX prints an error in every program that finds it and no GPU:

        pip install --no-deps --target CUDA jax-cuda13-plugin==V jax-cuda13-pjrt==V
        export JAXKERN_COMPILER=CUDA

    where V is the version of jax, and CUDA a folder that is not on Python's path.

    Args:
        arch: "sm_90a", which is Hopper.
        fn: A function that launches one kernel. It is traced by `jax.jit`.
        args: The arguments of `fn`, arrays or `jax.ShapeDtypeStruct`.

    Returns:
        The counts; `CompiledKernel.problem()` says in a sentence what is wrong.

    Raises:
        ValueError: `arch` is unknown, or `fn` does not launch exactly one kernel.
        MissingCompiler: A tool is not installed. The message says how to install it.
        RuntimeError: The kernel does not compile, or a tool fails or takes too long.
            The message has what the compiler or the tool printed.

    Examples:
        ```python
        import jax
        import jax.numpy as jnp
        from jax.experimental.pallas import mosaic_gpu as plgpu
        from jaxkern import testing


        def double(x):
            def kernel(x_gmem, y_gmem):
                y_gmem[...] = 2 * x_gmem[...]

            return plgpu.kernel(
                kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype)
            )(x)


        x = jax.ShapeDtypeStruct((128,), jnp.float32)
        kernel = testing.compile_for("sm_90a", double, x)
        assert (kernel.spilled_bytes, kernel.smem_bytes, kernel.wgmma) == (0, 0, 0)
        ```
    """
    if arch not in ARCHITECTURES:
        raise_unknown("compile_for", "arch", arch, ARCHITECTURES)
    found = tools()
    modules = lower(fn, args)
    if len(modules) != 1:
        raise ValueError(
            f"compile_for: fn must launch exactly one kernel, got {len(modules)}"
        )
    with tempfile.TemporaryDirectory() as stub:
        build_stub(Path(stub))
        return compile_module(modules[0], found, Path(stub))


def lower(fn: Callable[..., Any], args: Sequence[Any]) -> list[bytes]:
    """Return the modules of the kernels that `fn` launches."""
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


def fingerprint(module: bytes) -> str:
    """Return a hash of a module of `lower` that ignores the places of its sources.

    Those would change the hash with every comment in a source, and in another folder.
    """
    # Mosaic is imported when a kernel is first used.
    from jax._src.interpreters import mlir
    from jax.experimental.mosaic.gpu import core
    from jaxlib.mlir import ir, passmanager
    from jaxlib.mlir.dialects import gpu, llvm, nvvm

    # Importing these registers the operations of a module.
    del gpu, llvm, nvvm
    context: Any = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    mosaic: Any = core
    written = io.BytesIO()
    with context:
        mosaic.dialect.register_dialect(context)
        parsed: Any = ir.Module.parse(module)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(
            parsed.operation
        )
        parsed.operation.write_bytecode(written, desired_version=0)
    return hashlib.sha256(written.getvalue()).hexdigest()


def compile_module(module: bytes, found: Tools, stub: Path) -> CompiledKernel:
    """Compile one kernel's module, as `lower` returns it.

    Raises:
        RuntimeError: The kernel does not compile, or a tool fails or takes too long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "module").write_bytes(module)
        libraries = [stub, found.cudart.parent, os.environ.get("LD_LIBRARY_PATH", "")]
        environment = os.environ | found.environment
        environment |= {
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "KERNELS_CUBIN": str(folder / "cubin"),
            "KERNELS_SMEM": str(folder / "smem"),
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        command = [sys.executable, "-S", HERE / "compiler_process.py"]
        start = time.perf_counter()
        done = try_tool(*command, found.plugin, folder / "module", env=environment)
        seconds = time.perf_counter() - start
        output = done.stdout + "\n" + done.stderr
        if done.returncode:
            marks = ("error", "FAILED", "INTERNAL", "INVALID")
            lines = [
                s.strip() for s in output.splitlines() if any(m in s for m in marks)
            ]
            raise RuntimeError(
                f"does not compile: {' | '.join(lines[:3]) or last_words(output)}"
            )
        smem, cubin = folder / "smem", folder / "cubin"
        for written in (smem, cubin):
            if not written.exists():
                raise RuntimeError(
                    f"the driver's stub must write {written.name}, and has not: "
                    f"{last_words(output)}"
                )
        disassembler = found.disassembler
        counts = count_ptx(output)
        return CompiledKernel(
            **counts,
            faults=tuple(order.faults(output, counts["registers"])),
            smem_bytes=int(smem.read_text()),
            instructions=_count_sass(disassembler, cubin) if disassembler else None,
            seconds=seconds,
        )


def count_ptx(output: str) -> dict[str, Any]:
    """Read what the compiler prints, as fields of `CompiledKernel`."""

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
        "is_serialized": bool(re.search(r"wgmma.*serialized", output)),
    }


def _count_sass(disassembler: Path, cubin: Path) -> dict[str, int]:
    # -ndf leaves out an analysis of the data flow, which changes none of the counts.
    return count_sass(run_tool(disassembler, "-c", "-ndf", cubin).stdout)


def count_sass(text: str) -> dict[str, int]:
    """Count how often each instruction occurs in disassembled machine code."""
    # A line has an address, an optional predicate, and the name of the instruction.
    line = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"
    return dict(Counter(re.findall(line, text, re.MULTILINE)))


def versions(found: Tools) -> dict[str, str]:
    """Return the versions on which the machine code of a module depends."""
    text = run_tool(found.ptxas, "--version").stdout
    release = re.search(r"V(\d[\d.]*)", text)
    return {"jax": jax.__version__, "ptxas": release.group(1) if release else text}
