"""Faults in the order of a kernel's instructions, which no compiler looks for.

The emulator takes an inline function by what it means, and so does not see what it
writes. This follows the PTX of a whole kernel along its branches, and asks what PTX's
documentation asks of wgmma, of copies from shared memory, and of registers that
warpgroups hand to each other. Sources: PTX ISA,
"Asynchronous Warpgroup Level Matrix Instructions", "Async proxy", "setmaxnreg".
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Of one multiprocessor; a block's threads share them.
REGISTERS = 65536
WARPGROUP = 128
# Of wgmmas that may run at once, as far as this looks.
MOST_GROUPS = 8

_COPY = re.compile(r"cp\.async\.bulk(\.tensor\.\dd)?\.global\.shared::cta")
_SPARSE = re.compile(r"wgmma\.mma_async\.sp.*\}, \S+, \S+, (\S+), (\d),")
_SUMS = re.compile(r"wgmma\.mma_async\S*\s+\{([^}]*)\}")
_REGISTER = re.compile(r"%\w+")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")
_HANDED = re.compile(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+)")
_THREADS = re.compile(r"\.(?:req|max)ntid (\d+)")
# An instruction with its predicate, which some have.
_LINE = re.compile(r"(@!?%\w+\s+)?(.*)")
# Only labels of the compiler's: those in inline instructions are their own business.
_LABEL = re.compile(r"(\$L\w+):")
_BRANCH = re.compile(r"bra(?:\.uni)?\s+(\$L\w+)")


def faults(ptx: str, registers: int) -> list[str]:
    """Say in a sentence each what is wrong; nothing if nothing is.

    Args:
        ptx: Of one kernel.
        registers: Of one thread at launch.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    return [*_of_paths(lines), *_of_halves(lines), *_of_registers(ptx, registers)]


@dataclass(frozen=True)
class _State:
    """What is in flight.

    Attributes:
        is_fenced: Whether a wgmma may start.
        issued: Registers with the sums of wgmmas that are to be committed.
        groups: Those of each committed group that may run still.
        is_visible: Whether copies see what was written to shared memory.
    """

    is_fenced: bool = False
    issued: frozenset[str] = frozenset()
    groups: tuple[frozenset[str], ...] = ()
    is_visible: bool = False


def _of_paths(lines: Sequence[str]) -> list[str]:
    """Of every path through the branches, with whatever is in flight along it."""
    labels = {
        m.group(1): i for i, line in enumerate(lines) if (m := _LABEL.match(line))
    }
    found: dict[str, None] = {}
    seen: set[tuple[int, _State]] = set()
    paths = [(0, _State())]
    while paths:
        at, state = paths.pop()
        while at < len(lines):
            match = _LINE.fullmatch(lines[at])
            predicate, line = match.groups() if match else ("", "")
            if _LABEL.match(line):
                if (at, state) in seen:
                    break
                seen.add((at, state))
            if branch := _BRANCH.match(line):
                paths.append((labels[branch.group(1)], state))
                if not predicate:
                    break
            state, faults = _after(state, line)
            found |= dict.fromkeys(faults)
            if line.startswith(("ret;", "exit;", "trap;")) and not predicate:
                break
            at += 1
    return list(found)


def _after(state: _State, line: str) -> tuple[_State, list[str]]:
    """What an instruction makes of the state, and what is wrong with it there."""
    if line.startswith("wgmma.fence"):
        return replace(state, is_fenced=True), []
    if line.startswith("wgmma.mma_async"):
        sums = _SUMS.match(line)
        registers = _REGISTER.findall(sums.group(1)) if sums else []
        found = [] if state.is_fenced else ["a wgmma has no wgmma.fence before it"]
        return replace(state, issued=state.issued.union(registers)), found
    if line.startswith("wgmma.commit_group"):
        # Without a limit, a loop that awaits nothing would never be done.
        groups = (*state.groups, state.issued)[-MOST_GROUPS:]
        return replace(state, issued=frozenset(), groups=groups), []
    if wait := _WAIT.match(line):
        found = ["a wgmma is awaited before it is committed"] if state.issued else []
        first = max(0, len(state.groups) - int(wait.group(1)))
        # What is awaited may be read and written, so that the next one needs a fence.
        return replace(state, is_fenced=False, groups=state.groups[first:]), found
    if line.startswith("fence.proxy.async"):
        return replace(state, is_visible=True), []
    if line.startswith("st.shared"):
        state = replace(state, is_visible=False)
    if line.startswith("ret;") and (state.issued or any(state.groups)):
        return state, ["a wgmma is not awaited before the kernel ends"]
    found = []
    if _COPY.match(line) and not state.is_visible:
        found.append("a copy from shared memory has no fence.proxy.async before it")
    # Of sums that go round a loop, the compiler removes the copies.
    if not line.startswith("mov."):
        used = _REGISTER.findall(line)
        if not all(group.isdisjoint(used) for group in (state.issued, *state.groups)):
            found.append("a wgmma's sums are used before it is awaited")
    return state, found


def _of_halves(lines: Sequence[str]) -> list[str]:
    """Of the words of positions, each half serves one sparse wgmma."""
    halves = Counter(m.groups() for line in lines if (m := _SPARSE.search(line)))
    if any(count > 1 for count in halves.values()):
        return ["sparse wgmmas read the same half of a word of positions"]
    return []


def _of_registers(ptx: str, registers: int) -> list[str]:
    """Those at launch are what warpgroups hand to each other: asking for more hangs."""
    handed = _HANDED.findall(ptx)
    threads = _THREADS.search(ptx)
    if not handed or threads is None:
        return []
    warpgroups = int(threads.group(1)) // WARPGROUP
    asked = [int(count) for kind, count in handed if kind == "inc"]
    left = [int(count) for kind, count in handed if kind == "dec"]
    # One warpgroup gives registers for all others.
    wanted = max(asked, default=0) * (warpgroups - 1) + max(left, default=registers)
    there = min(registers * warpgroups, REGISTERS // WARPGROUP)
    if asked and wanted > there:
        return [
            f"warpgroups ask for {wanted} registers a thread of each, and there are "
            f"{there}"
        ]
    return []
