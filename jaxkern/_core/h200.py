"""The rates of an H200, and the shares of them that programs reach.

The rates are from NVIDIA's data sheet, except that of the L2 cache: it was inferred
from kernels whose tiles wait for L2. The shares were measured on an H200 at 700 W on
2026-11-26 (`benchmarks/results/nvidia_h200`).
"""

# Multiply-adds of 16-bit numbers that the tensor cores of one multiprocessor do in one
# clock.
MACS_PER_CLOCK = 2048
CLOCKS_PER_US = 1830.0
MEMORY_BYTES_PER_US = 4.8e6
L2_BYTES_PER_US = 11e6
# The share of the memory's rate that XLA's elementwise programs reach over 541 MB. The
# models assume the same share for our kernels, for which it was not measured.
MEMORY_SHARE = 0.7
# The microseconds of a launch before its first loads arrive and after its last stores.
LAUNCH_US = 2.0
