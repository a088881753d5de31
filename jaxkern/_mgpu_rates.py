"""What an H200 can do, and how much of it is reached: what predictions are made of.

Nothing here has been measured on one by this project. Reads of L2: by RRZE's
gpu-benches, gpu-l2-cache/h200.txt, 9.7 to 10.3 TB/s up to 40 MB.
"""

# Multiply-adds of 16-bit numbers and special function operations a clock of one
# multiprocessor; memory and L2 bytes, and clocks, a microsecond.
MACS, MUFU_OPS = 2048, 16
MEMORY_BYTES, L2_BYTES, CLOCKS = 4.8e6, 9.5e6, 1830.0
# Predicted: the part of the tensor cores' and the memory's rate that is reached, and
# microseconds of a launch until its first loads are there and its last stores done.
MATMUL_RATE, MEMORY_RATE, LAUNCH_US = 0.7, 0.8, 2.0
