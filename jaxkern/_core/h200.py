"""What an H200 can do, and how much of it was reached on one.

Rates of the chip are from its data sheet. What is reached was measured on an H200 at
700 W on 2026-11-26: of the tensor cores by our matmul kernels and by XLA's (cuBLAS) at
16384 x 1024 x 16512 and back; of the memory by XLA's elementwise programs over 541 MB;
L2 by kernels whose tiles wait for it.
"""

# Multiply-adds of 16-bit numbers and special function operations a clock of one
# multiprocessor; memory and L2 bytes, and clocks, a microsecond.
MACS, MUFU_OPS = 2048, 16
MEMORY_BYTES, L2_BYTES, CLOCKS = 4.8e6, 11e6, 1830.0
# Of the tensor cores' rate by our kernels and by XLA's, of the memory's; microseconds
# of a launch until its first loads are there and its last stores done.
MATMUL_RATE, XLA_RATE, MEMORY_RATE, LAUNCH_US = 0.74, 0.79, 0.7, 2.0
