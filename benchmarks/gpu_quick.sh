#!/bin/sh
# The part of benchmarks/gpu.sh that fits into seven minutes: a machine may be lent for
# a quarter of an hour. Tests first, then the rows by which kernels are judged, each with a limit.
#   sh benchmarks/gpu_quick.sh [FOLDER [PART ...]]
#     FOLDER   default: benchmarks/results/nvidia_h200
#     PART     of: tests estimators attention mlp flash_mlp; default: all
# Rows are saved as they come, in *_quick.json; a part that is cut off keeps its own.
folder=${1:-benchmarks/results/nvidia_h200}
[ $# -gt 0 ] && shift
python=${PYTHON:-python3}
mkdir -p "$folder" || exit 1
status=0

tests="positions or masked or sparsity or test_fused or attention_on_gpu or long"
tests="$tests or blocks_on_gpu or (flash and silu and bfloat16)"

part() {
  case $1 in
  tests)
    workers=$($python -c "import xdist; print('-n auto --maxprocesses 14')" 2>/dev/null)
    XLA_FLAGS="$XLA_FLAGS --xla_gpu_autotune_level=0" \
      XLA_PYTHON_CLIENT_PREALLOCATE=false \
      timeout 110 $python -m pytest -q -o addopts=--import-mode=importlib -W default -m gpu tests $workers \
      -k "$tests"
    ;;
  estimators)
    timeout 75 $python -m benchmarks.estimators --json "$folder/estimators_quick.json" \
      --only "bilinear (straight_through|one_plus_sigmoid) 16 |former straight_through 16 "
    ;;
  attention)
    timeout 75 $python -m benchmarks.attention --kernels --backward \
      --json "$folder/attention_kernels_quick.json" \
      --only "\(4, 4096.* (causal|dense) (jaxkern mosaic|cudnn)|(10%|window|documents) .*mosaic"
    ;;
  mlp)
    timeout 60 $python -m benchmarks.mlp --json "$folder/mlp_quick.json" --models 7B \
      --batches 32 --only "(mosaic_gpu|plain jnp) (low|packed)"
    ;;
  flash_mlp)
    timeout 50 $python -m benchmarks.flash_mlp --json "$folder/flash_mlp_quick.json" \
      --no-peers --only " (mosaic_gpu|xla)$"
    ;;
  *)
    echo "gpu_quick.sh: PART must be tests, estimators, attention, mlp or flash_mlp," \
      "got $1" >&2
    return 2
    ;;
  esac
}

for name in ${@:-tests estimators attention mlp flash_mlp}; do
  part "$name" || status=1
done
exit $status
