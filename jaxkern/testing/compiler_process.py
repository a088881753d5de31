"""Compile one kernel in a process of its own, since the compiler may crash it.

The process runs this file by its path and does not import JAX, which would take longer
than compiling.
"""

import ctypes
import os
import sys
from pathlib import Path


def compile_here(plugin: str, path: str) -> None:
    module = Path(path).read_bytes()
    function = ctypes.CDLL(plugin).MosaicGpuCompile
    function.argtypes = [ctypes.c_char_p, ctypes.c_int]
    function.restype = ctypes.c_void_p
    done = function(module, len(module))
    sys.stdout.flush()
    # A normal exit would run destructors, which look for a driver.
    os._exit(0 if done else 1)


if __name__ == "__main__":
    compile_here(*sys.argv[1:])
