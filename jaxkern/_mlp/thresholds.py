"""The sizes for which None picks the kernel of an MLP, because it is faster than XLA.

"Measured" means one H200 at 700 W on 2026-11-26, bfloat16, forward and backward; the
times stand in `benchmarks/results/nvidia_h200/launches.json`, each with its revision.
"Predicted" means the models of `tests/mlp_cost.py`: the kernel is picked if they
predict that it takes less time than XLA for forward and backward, and no more for the
forward alone. Single launches are predicted within a tenth, so most rows of
`THRESHOLDS` keep a margin of 5 %, or of 10 % with 2:4 chosen by token. `swiglu`, with a
predicted gain of 2 to 5 %, keeps none. No model predicts `flash_mlp`: its other sizes
follow those that were measured.

Small sizes stay with XLA, since a call takes 50 to 90 us by wall clock, the time of a
launch, whatever its kernels take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DenseKernel = Literal["flash_mlp", "matmul"]
NEVER = math.inf

# Copies pad the ranks and hidden features of low-rank MLPs to a multiple of this
# number: 64 numbers of 16 bits are the 128 bytes of a row of a tile in shared memory.
FEATURE_STEP = 64

# Numbers in the hidden layer of all heads and tokens, from which on None picks the
# kernel of `flash_mlp`. Measured on both sides, in us, kernel against XLA:
#   (heads, batch, dim, hidden)  million numbers    device     wall clock
#   (8, 512, 64, 512)                        2.1    21 /  32    76 /  72
#   (12, 1024, 64, 768)                      9.4    44 /  77   105 / 142
LEAST_HIDDEN_NUMBERS = 2**23
# Pairs of the largest dim, and the least heads x batch and heads x hidden. Each product
# is cut into the tiles of one pass, and few tiles leave multiprocessors idle. Measured,
# in us of the device, kernel against XLA:
#   (32, 4096, 64, 512)     170 / 440
#   (16, 2048, 64, 1024)     89 / 221
#   (16, 4096, 128, 1024)   261 / 438
#   (8, 4096, 256, 1024)    460 / 266, so that larger dims stay with XLA
# By wall clock the same ones won and lost. The least products, and the row of dim 96,
# are judged by these, not measured.
FLASH_MLP_ROWS = ((64, 2048), (96, 4096), (128, 8192))
# The same with a gate. Measured: (16, 4096, 128, 1024) took 622 us of the device and
# XLA 707. The other rows are judged by those without a gate.
GATED_FLASH_MLP_ROWS = ((64, 2048), (96, 4096), (128, 16384))


def flash_mlp_is_faster(
    heads: int, batch: int, dim: int, hidden: int, *, gated: bool
) -> bool:
    """Say whether None picks the kernel of `flash_mlp` for these sizes."""
    if heads * batch * hidden < LEAST_HIDDEN_NUMBERS:
        return False
    table = GATED_FLASH_MLP_ROWS if gated else FLASH_MLP_ROWS
    rows = next((rows for largest, rows in table if dim <= largest), NEVER)
    return heads * min(batch, hidden) >= rows


@dataclass(frozen=True)
class Threshold:
    """Up to a rank, the least number of tokens for which None picks a kernel.

    Attributes:
        rank: The largest rank, or the largest size of a full-rank weight.
        tokens: The least tokens if ranks and hidden features are multiples of
            `FEATURE_STEP`.
        padded_tokens: The least tokens if they are not, so that each call copies the
            weights.
    """

    rank: int | float
    tokens: int | float
    padded_tokens: int | float


# The rows of each op, or of each sparsity of `low_rank_relu2`. The first row with a
# large enough rank holds. Measured times are us of the device for 16384 tokens of the
# named model, kernel against XLA, both at revision fbd33d7 unless another one is named.
# All other sizes are predicted.
THRESHOLDS = {
    # Measured: 8192 tokens of 7B (4096 features), 9906 at 1b185df, after forwards with
    # a gate were made faster, against 10432 at fbd33d7, where ours took 11435.
    # Predicted from 8192 tokens on: a gain of 3 % with 2048 features, and of 1 % with
    # 4096, where 5 % were measured.
    "swiglu": (Threshold(1024, 512, NEVER), Threshold(4096, 8192, NEVER)),
    # Measured: 350M 671 against 766 and 1B 2104 against 4649, both padded; 7B 7227 at
    # 1b185df against 8007 at fbd33d7, where ours took 8178.
    "low_rank_swiglu": (Threshold(512, 512, 8192), Threshold(1024, 4096, 8192)),
    # Measured: 350M 489 against 650 and 1B 1524 against 3666, both padded; 7B 6221
    # against 6656.
    "low_rank_relu2": (Threshold(NEVER, 512, 2048),),
    # Measured: 7B 3407 against 3983.
    "2:4-static": (Threshold(NEVER, 512, 4096),),
    # Measured: 7B 6314 against 6923.
    "2:4": (Threshold(1024, 2048, 4096), Threshold(NEVER, 8192, 8192)),
    # Predicted, not measured. It keeps the hidden features too, so that larger ranks
    # are predicted to gain nothing.
    "2:4 straight_through": (Threshold(1024, 2048, 4096),),
    # Measured: 7B 6788 against 7994.
    "2:4-soft": (Threshold(NEVER, 1024, 1024),),
}


def kernel_is_faster(name: str, tokens: int, ranks: Sequence[int], hidden: int) -> bool:
    """Say whether None picks the kernel of an MLP; `name` is one of `THRESHOLDS`."""
    padded = any(size % FEATURE_STEP for size in (*ranks, hidden))
    for row in THRESHOLDS[name]:
        if max(ranks) <= row.rank:
            return tokens >= (row.padded_tokens if padded else row.tokens)
    return False


# The largest rank for which a low-rank MLP takes the kernel of `flash_mlp`. Up to here
# the matmul kernels would pad each rank to at least twice its size. Predicted.
LARGEST_FLASH_RANK = FEATURE_STEP // 2


def dense_kernel(ranks: Sequence[int]) -> DenseKernel:
    """Return the kernel that computes a low-rank MLP with these ranks.

    The kernel of `flash_mlp` needs equal ranks, and its hidden features never reach
    memory. But with only one head, the gradients of the weights have few tiles for the
    multiprocessors to share.
    """
    is_flash = len({*ranks}) == 1 and ranks[0] <= LARGEST_FLASH_RANK
    return "flash_mlp" if is_flash else "matmul"


# The least tokens for which None picks the kernel of `low_rank_relu2` with packed
# factors. Measured at fbd33d7, forward, in us of the device for 16384 tokens of 7B:
#   our kernels, packed factors   1477
#   our kernels, dense factors    1751
#   XLA, dense factors            2097
#   XLA, packed factors           not measured; it unpacks them first
# Fewer tokens and other models are predicted.
PACKED_RELU2_TOKENS = 4096
