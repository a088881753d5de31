"""Pictures of block masks."""

from typing import Any

import numpy as np
from jaxtyping import Int8

from .patterns import blocks_of
from .runs import EMPTY, FULL


def to_string(states: Int8[np.ndarray, "q_blocks kv_blocks"], width: int) -> str:
    step = blocks_of(max(states.shape), width)
    past = [(0, -n % step) for n in states.shape]
    rows, columns = (blocks_of(n, step) for n in states.shape)

    def each(reduce, fill):
        padded = np.pad(states, past, constant_values=fill)
        return reduce(padded.reshape(rows, step, columns, step), axis=(1, 3))

    lowest, highest = each(np.min, FULL), each(np.max, EMPTY)
    marks = np.where(lowest == FULL, "#", np.where(highest == EMPTY, ".", "+"))
    return "\n".join(map("".join, marks))


def plot(states: Int8[np.ndarray, "q_blocks kv_blocks"], title: str, ax: Any) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "BlockMask.plot: matplotlib must be installed; print(mask) needs none"
        ) from error
    ax = plt.subplots()[1] if ax is None else ax
    extent = (0, states.shape[1], states.shape[0], 0)
    ax.imshow(states, cmap="Blues", vmin=EMPTY, vmax=FULL, extent=extent)
    ax.set(xlabel="key block", ylabel="query block", title=title)
    return ax
