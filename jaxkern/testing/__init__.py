"""Check kernels and what they compute, on any machine.

- `emulate_gpu` runs Pallas Mosaic GPU kernels on a CPU and finds their races.
- `compile_for` compiles kernels for a GPU that need not be there, and counts registers,
  spills, shared memory and instructions.
- `relative_error` and `assert_as_close` compare results with a definition in float64.
- `plain` has the ops of jaxkern as one writes them in jnp.

All of them accept kernels of yours. `import jaxkern` does not import this module.
"""

from . import plain as plain
from .closeness import assert_as_close as assert_as_close
from .closeness import relative_error as relative_error
from .compiler import CompiledKernel as CompiledKernel
from .compiler import compile_for as compile_for
from .emulator.emulate import emulate_gpu as emulate_gpu
from .emulator.errors import DeadlockError as DeadlockError
from .emulator.errors import RaceError as RaceError
from .tools import MissingCompiler as MissingCompiler
