#!/bin/sh
# Everything that needs a GPU: its tests, then every benchmark, rows saved as they come.
#   sh benchmarks/gpu.sh [FOLDER]      (default: benchmarks/results/nvidia_h200)
# Runs with the packages of `python3` as they are; set PYTHON for another one.
folder=${1:-benchmarks/results/nvidia_h200}
python=${PYTHON:-python3}
mkdir -p "$folder" || exit 1
status=0
# Each test compiles programs of its own: side by side if pytest-xdist is there, and
# without timing XLA's candidates for every matmul.
workers=
$python -c "import xdist" 2>/dev/null && workers="-n auto --maxprocesses 16"
# Without the options that need the packages of the extra "dev". Two test files may
# have one name, in two folders.
XLA_FLAGS="$XLA_FLAGS --xla_gpu_autotune_level=0" XLA_PYTHON_CLIENT_PREALLOCATE=false \
  $python -m pytest -q $workers -o addopts=--import-mode=importlib -W default -m gpu tests || status=1
# Kernels first, since a machine may be lent for half an hour only.
$python -m benchmarks.attention --kernels --backward \
  --json "$folder/attention_kernels_backward.json" || status=1
for benchmark in flash_mlp attention mlp estimators compress; do
  $python -m benchmarks.$benchmark --json "$folder/$benchmark.json" \
    --plot "$folder/$benchmark.png" || status=1
done
$python -m benchmarks.transformer --dtype bfloat16 \
  --json "$folder/transformer.json" --plot "$folder/transformer.png" || status=1
$python -m benchmarks.attention --kernels \
  --json "$folder/attention_kernels.json" || status=1
$python -m benchmarks.flash_mlp --sweep --only " (mosaic_gpu|xla)$" \
  --json "$folder/flash_mlp_sweep.json" --plot "$folder/flash_mlp_sweep.png" || status=1
$python -m benchmarks.mlp --backward --no-peers --json "$folder/mlp_backward.json" ||
  status=1
$python -m benchmarks.mlp --full --no-peers --json "$folder/mlp_full.json" \
  --plot "$folder/mlp_full.png" || status=1
exit $status
