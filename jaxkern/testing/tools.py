"""The programs that compile a kernel, and how they are found and run."""

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 300
# The environment variable with a folder of packages that is not on Python's path.
FOLDER = "JAXKERN_COMPILER"
TOOLS = "pip install 'jaxkern-fused[testing]'"
Ended = subprocess.CompletedProcess[str]


class MissingCompiler(ImportError):
    """A tool or package that `compile_for` needs is not installed.

    The message says which one, and how to install it.

    Examples:
        A test that skips itself on a machine without these tools:

        ```python
        import jax
        import jax.numpy as jnp
        import pytest
        from jax.experimental.pallas import mosaic_gpu as plgpu
        from jaxkern import testing


        def kernel(y_gmem):
            y_gmem[...] = jnp.zeros(128, jnp.float32)


        def test_no_spills():
            zeros = plgpu.kernel(
                kernel, out_type=jax.ShapeDtypeStruct((128,), jnp.float32)
            )
            try:
                compiled = testing.compile_for("sm_90a", zeros)
            except testing.MissingCompiler as missing:
                pytest.skip(str(missing))
            assert compiled.problem() is None


        assert issubclass(testing.MissingCompiler, ImportError)
        ```
    """


@dataclass(frozen=True)
class Tools:
    """The paths of the tools that compile a kernel.

    Attributes:
        plugin: JAX's CUDA plugin, which holds the compiler.
        runtime: Mosaic's library that a module is linked with.
        ptxas: The assembler.
        cudart: CUDA's runtime library.
        disassembler: The program nvdisasm; None if it is not installed.
    """

    plugin: Path
    runtime: Path
    ptxas: Path
    cudart: Path
    disassembler: Path | None

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables by which the compiler finds the other tools."""
        return {
            "MOSAIC_GPU_RUNTIME_LIB_PATH": str(self.runtime),
            # The toolkit's folder, which has the assembler in `bin`.
            "MOSAIC_GPU_CUDA_ROOT": str(self.ptxas.parents[1]),
        }


def _search(*patterns: str) -> Path | None:
    """Return the first match in `FOLDER`, on Python's path or in the CUDA toolkit."""
    cuda_home = os.environ.get("CUDA_HOME")
    roots = [os.environ.get(FOLDER), *sys.path, "/usr/local/cuda", cuda_home]
    for root in filter(None, roots):
        for pattern in patterns:
            found = sorted(glob.glob(os.path.join(root, pattern)))
            if found:
                return Path(found[-1]).absolute()
    return None


def tools() -> Tools:
    """Find the tools that compile.

    Raises:
        MissingCompiler: One of them, other than the disassembler, is not installed.
    """
    plugin = _search("jax_plugins/xla_cuda*/xla_cuda_plugin.so")
    runtime = _search("jax_cuda*_plugin/libmosaic_gpu_runtime.so")
    if plugin is None or runtime is None:
        version = jax.__version__
        raise MissingCompiler(
            "compile_for: JAX's CUDA plugin must be installed: with a GPU, pip install "
            "'jax[cuda13]'; without one, apart from this environment, pip install "
            f"--no-deps --target CUDA jax-cuda13-plugin=={version} "
            f"jax-cuda13-pjrt=={version}, and {FOLDER}=CUDA in the environment"
        )
    _needed(
        "libdevice (nvidia-nvvm)", "nvidia/cu*/nvvm/libdevice/*", "nvvm/libdevice/*"
    )
    if not _c_compiler():
        raise MissingCompiler("compile_for: a C compiler, gcc or cc, must be installed")
    on_path = shutil.which("nvdisasm")
    disassembler = _search("nvidia/cu*/bin/nvdisasm", "bin/nvdisasm")
    return Tools(
        plugin=plugin,
        runtime=runtime,
        ptxas=_needed("ptxas (nvidia-cuda-nvcc)", "nvidia/cu*/bin/ptxas", "bin/ptxas"),
        cudart=_needed(
            "libcudart (nvidia-cuda-runtime)",
            "nvidia/cu*/lib/libcudart*",
            "lib*/libcudart*",
        ),
        disassembler=Path(on_path) if on_path else disassembler,
    )


def _needed(name: str, *patterns: str) -> Path:
    path = _search(*patterns)
    if path is None:
        raise MissingCompiler(f"compile_for: {name} must be installed: {TOOLS}")
    return path


def _c_compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


def build_stub(folder: Path) -> None:
    """Build the stub of the driver, libcuda.so.1, in a folder.

    Raises:
        RuntimeError: The C compiler fails.
    """
    target = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{target.name}"]
    command = [_c_compiler() or "cc", *options, "-o", target, HERE / "cuda_stub.c"]
    run_tool(*command)


def run_tool(*command: object, env: Mapping[str, str] | None = None) -> Ended:
    """Run a tool, and check that it succeeds.

    Raises:
        RuntimeError: The tool takes too long or fails. The message has the end of what
            it printed.
    """
    done = try_tool(*command, env=env)
    if done.returncode:
        raise RuntimeError(f"{_name(command)} failed: {last_words(done.stderr)}")
    return done


def try_tool(*command: object, env: Mapping[str, str] | None = None) -> Ended:
    """Run a tool like `run_tool`, but let the caller see whether it failed."""
    try:
        return subprocess.run(
            list(map(str, command)),
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stderr or b""
        words = said if isinstance(said, str) else said.decode(errors="replace")
        raise RuntimeError(
            f"{_name(command)} took more than {TIMEOUT_SECONDS} s: {last_words(words)}"
        ) from None


def _name(command: Sequence[object]) -> str:
    return Path(str(command[0])).name


def last_words(said: str) -> str:
    """Return the end of what a tool printed."""
    return said.strip()[-300:].strip() or "it said nothing"
