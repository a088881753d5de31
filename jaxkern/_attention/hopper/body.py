"""The arithmetic of one warpgroup, as the frame of `walk.py` calls it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..._mosaic.base import plgpu


@dataclass(frozen=True)
class WalkedTiles:
    """The walked tiles of one step, as one warpgroup sees them.

    Attributes:
        smem: for each group, the buffers of its operands.
        filled, emptied: for each group, the barriers of its slots.
        turn: the barrier at which both warpgroups meet; empty if they take no turns.
        slot: where in the rings the tiles of this step lie.
    """

    smem: Sequence[Sequence[Any]]
    filled: Sequence[Any]
    emptied: Sequence[Any]
    turn: Sequence[Any]
    slot: Any

    def wait(self, n: int):
        """Wait until the tiles of walked group `n` are loaded, and return them."""
        plgpu.barrier_wait(self.filled[n].at[self.slot])
        return [smem.at[self.slot] for smem in self.smem[n]]

    def release(self, n: int) -> None:
        """Let the tiles of walked group `n` be overwritten."""
        plgpu.barrier_arrive(self.emptied[n].at[self.slot])

    def take_turns(self) -> None:
        """Wait until the other warpgroup calls this too, if both share a ring."""
        take_turns(self.turn)


def take_turns(turn: Sequence[Any]) -> None:
    """Meet the other warpgroup at the barrier, if there is one."""
    for barrier in turn:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


@runtime_checkable
class Body(Protocol):
    """The arithmetic of one warpgroup for one held tile: start, steps and finish."""

    @property
    def outs(self) -> Sequence[int | None]:
        """For each result the index of the held operand that it is like.

        None stands for one float32 number a row.
        """
        ...

    @property
    def takes_turns(self) -> bool:
        """Whether `step` calls `tiles.take_turns` twice.

        What a warpgroup does between the two calls then runs beside what the other one
        does outside of them. Warpgroup 1 meets once before its first step, which puts
        it half a step behind, and warpgroup 0 once after its last step.
        """
        ...

    def start(self, held: Sequence[Any]) -> Any:
        """Return the carry before the first step, from the held tiles."""
        ...

    def step(
        self,
        carry: Any,
        held: Sequence[Any],
        tiles: WalkedTiles,
        visible: Callable[[], Any] | None,
    ) -> Any:
        """Return the carry after the walked tiles of one step.

        Args:
            visible: returns which pairs attend, (rows, columns), in a partial block;
                None in a full one.
        """
        ...

    def finish(self, carry: Any) -> Sequence[Any]:
        """Return the results, one for each entry of `outs`."""
        ...
