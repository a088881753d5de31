"""What an H200 can do, and how much of it was reached on one.

The chip's own rates are from its data sheet, but for L2's, which kernels showed whose
tiles wait for it. What is reached was measured on an H200 at 700 W on 2026-11-26
(`benchmarks/results/nvidia_h200`).
"""

# Multiply-adds of 16-bit numbers on the tensor cores of one multiprocessor.
MACS_PER_CLOCK = 2048
CLOCKS_PER_US = 1830.0
MEMORY_BYTES_PER_US = 4.8e6
L2_BYTES_PER_US = 11e6
# Share of the memory's rate that XLA's elementwise programs reach over 541 MB. What our
# kernels move is taken to come at the same rate, which was not measured.
MEMORY_SHARE = 0.7
# From a launch until its first loads are there, and from its last stores to its end.
LAUNCH_US = 2.0
