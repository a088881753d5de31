"""For which sizes None picks a kernel of an MLP: where it is faster than XLA.

A kernel is picked where it took less time than XLA forward and backward, in what was
measured: on one H200 at 700 W on 2026-11-26, `benchmarks/results/nvidia_h200`. Other
sizes of `THRESHOLDS` are predicted by the models of `tests/mlp_cost.py`: a kernel
is picked where these say that it takes less time forward and backward, and no more
forward. Most rows keep a distance to that of a twentieth, or of a tenth with 2:4 chosen
by token, since single launches are predicted within a tenth; `swiglu` does not, which
is predicted to gain 2 to 5 %. Other sizes of `flash_mlp` are judged by those that were
measured, and no model was asked.

Small sizes stay with XLA: there a call takes as long as it takes to launch, 50 to 90 us
by wall clock, whatever the kernels take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DenseKernel = Literal["flash_mlp", "matmul"]
NEVER = math.inf

# What the kernels of low-rank MLPs pad ranks and hidden features to, by copies.
FEATURE_STEP = 64

# Hidden features of all heads and tokens, from which on `flash_mlp` is picked. At
# (heads, batch, dim, hidden) (8, 512, 64, 512), which has 2.1 million, forward and
# backward took 21 us of the device against XLA's 32 but, by wall clock, 92.7 against
# 78.1 and, in another run, 76.4 against 71.8. At (12, 1024, 64, 768), with 9.4 million,
# it was faster by both: 43 against 78 us of the device, 75 against 93 by wall clock.
LEAST_HIDDEN_NUMBERS = 2**23
# The least heads x batch and heads x hidden, by the largest dim: each is cut into the
# tiles of one pass, and few of them leave multiprocessors idle. Forward and backward,
# in us of the device: at dim 64, (16, 2048, 64, 1024) took 89 against XLA's 221 and
# (32, 4096, 64, 512) 168 against 441; at 128, (16, 4096, 128, 1024) took 261 against
# 438; at 256 it lost: (8, 4096, 256, 1024) took 460 against 266. By wall clock the same
# ones won and lost. Other dims, and the fewest rows of each, are judged by these.
FLASH_MLP_ROWS = ((64, 2048), (96, 4096), (128, 8192))
# The same with a gate, where (16, 4096, 128, 1024) took 622 against 707 us of the
# device; the rest is judged by the rows without a gate.
GATED_FLASH_MLP_ROWS = ((64, 2048), (96, 4096), (128, 16384))


def flash_mlp_is_faster(
    heads: int, batch: int, dim: int, hidden: int, *, gated: bool
) -> bool:
    """Whether None picks the kernel of `flash_mlp` for these sizes."""
    if heads * batch * hidden < LEAST_HIDDEN_NUMBERS:
        return False
    table = GATED_FLASH_MLP_ROWS if gated else FLASH_MLP_ROWS
    rows = next((rows for largest, rows in table if dim <= largest), NEVER)
    return heads * min(batch, hidden) >= rows


@dataclass(frozen=True)
class Threshold:
    """A kernel is picked up to a rank, from so many tokens on.

    tokens: where ranks and hidden features are multiples of `FEATURE_STEP`.
    padded_tokens: where they are not, so that every call copies the weights.
    """

    rank: int | float
    tokens: int | float
    padded_tokens: int | float


# By op, or the sparsity of `low_rank_relu2`; the first row with a large enough rank
# holds. Where a time stands, it is in us of the device, ours against XLA's, forward and
# backward, of 16384 tokens of the named model, both in one run, of the tree at fbd33d7.
# Forwards with a gate were made faster after it. They were timed again at 1b185df, and
# XLA was not: what did not change took within 3 % of the same.
THRESHOLDS = {
    # 7B (4096 features), 8192 tokens: 9906 at 1b185df against 10432 at fbd33d7, where
    # ours took 11435. The rest is predicted: from 8192 tokens on a gain of 3 % with
    # 2048 features, and of 1 % with 4096, where the measured one is 5 %.
    "swiglu": (Threshold(1024, 512, NEVER), Threshold(4096, 8192, NEVER)),
    # 350M 671 against 766, 1B 2104 against 4649, both padded. 7B 7227 at 1b185df
    # against 8007 at fbd33d7, where ours took 8178; of the difference, 715 are the
    # forward's kernel, which was timed alone at both. The rest is predicted.
    "low_rank_swiglu": (Threshold(512, 512, 8192), Threshold(1024, 4096, 8192)),
    # 350M 489 against 650, 1B 1524 against 3666, both padded; 7B 6221 against 6656.
    # The rest is predicted.
    "low_rank_relu2": (Threshold(NEVER, 512, 2048),),
    # 7B 3407 against 3983. The rest is predicted.
    "2:4-static": (Threshold(NEVER, 512, 4096),),
    # 7B 6314 against 6923. The rest is predicted.
    "2:4": (Threshold(1024, 2048, 4096), Threshold(NEVER, 8192, 8192)),
    # Predicted, not measured: the hidden features are kept too.
    "2:4 straight_through": (Threshold(1024, 2048, 4096),),
    # 7B 6788 against 7994. The rest is predicted.
    "2:4-soft": (Threshold(NEVER, 1024, 1024),),
}


def kernel_is_faster(name: str, tokens: int, ranks: Sequence[int], hidden: int) -> bool:
    """Whether None picks a kernel for an MLP from and to (tokens, rank).

    name: of `THRESHOLDS`.
    """
    padded = any(size % FEATURE_STEP for size in (*ranks, hidden))
    for row in THRESHOLDS[name]:
        if max(ranks) <= row.rank:
            return tokens >= (row.padded_tokens if padded else row.tokens)
    return False


# Up to here the matmul kernels would pad each rank to twice its size. Predicted.
LARGEST_FLASH_RANK = FEATURE_STEP // 2


def dense_kernel(ranks: Sequence[int]) -> DenseKernel:
    """Which kernel takes a low-rank MLP with these ranks, on a device that has it.

    That of `flash_mlp` takes equal ranks only, and hidden features then never reach
    memory. But of one head its gradients of the weights have few tiles to share.
    """
    is_flash = len({*ranks}) == 1 and ranks[0] <= LARGEST_FLASH_RANK
    return "flash_mlp" if is_flash else "matmul"


# Tokens from which on None picks the kernel of `low_rank_relu2` of packed factors. At
# fbd33d7, 16384 tokens
# of 7B took 1477 us of the device, where our kernels of the same MLP with dense weights
# took 1751 and XLA's 2097. XLA's with packed weights, which unpacks them and then does
# the latter, was not timed. Fewer tokens, and other models, are predicted.
PACKED_RELU2_TOKENS = 4096
