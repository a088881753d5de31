"""Find faults in the order of a kernel's instructions, for which no compiler looks.

The emulator replaces an inline function by its meaning, so it does not see the
instructions of that function. This module reads the PTX of a whole kernel along all its
branches. It checks what PTX's documentation demands of wgmma, of copies from shared
memory, and of the registers that warpgroups hand to each other. Sources: PTX ISA,
"Asynchronous Warpgroup Level Matrix Instructions", "Async proxy", "setmaxnreg".
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Registers of one multiprocessor, which the threads of a block share.
REGISTERS = 65536
# Threads of a warpgroup.
WARPGROUP = 128
# Committed groups of wgmmas that are followed at once.
MOST_GROUPS = 8

_COPY = re.compile(r"cp\.async\.bulk(\.tensor\.\dd)?\.global\.shared::cta")
_SPARSE = re.compile(r"wgmma\.mma_async\.sp.*\}, \S+, \S+, (\S+), (\d),")
_SUMS = re.compile(r"wgmma\.mma_async\S*\s+\{([^}]*)\}")
_REGISTER = re.compile(r"%\w+")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")
_HANDED = re.compile(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+)")
_THREADS = re.compile(r"\.(?:req|max)ntid (\d+)")
# An optional predicate, and the instruction.
_LINE = re.compile(r"(@!?%\w+\s+)?(.*)")
# Labels that the compiler made. Labels within inline instructions are not followed.
_LABEL = re.compile(r"(\$L\w+):")
_BRANCH = re.compile(r"bra(?:\.uni)?\s+(\$L\w+)")


def faults(ptx: str, registers: int) -> list[str]:
    """Return the faults of a kernel, a sentence each.

    Args:
        ptx: The PTX of one kernel.
        registers: Registers of one thread at launch.
    """
    lines = [line.strip() for line in ptx.splitlines()]
    return [*_of_paths(lines), *_of_halves(lines), *_of_registers(ptx, registers)]


@dataclass(frozen=True)
class _State:
    """The asynchronous work in flight at one instruction.

    Attributes:
        is_fenced: Whether a wgmma may start.
        issued: Registers with the sums of wgmmas that are not committed yet.
        groups: For each committed group that may still run, its registers with sums.
        is_visible: Whether copies see all that was written to shared memory.
    """

    is_fenced: bool = False
    issued: frozenset[str] = frozenset()
    groups: tuple[frozenset[str], ...] = ()
    is_visible: bool = False


def _of_paths(lines: Sequence[str]) -> list[str]:
    """Return the faults on all paths through the branches.

    A path ends where another one came to the same label with the same state.
    """
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
    """Return the state after an instruction, and what is wrong with it there."""
    if line.startswith("wgmma.fence"):
        return replace(state, is_fenced=True), []
    if line.startswith("wgmma.mma_async"):
        sums = _SUMS.match(line)
        registers = _REGISTER.findall(sums.group(1)) if sums else []
        found = [] if state.is_fenced else ["a wgmma has no wgmma.fence before it"]
        return replace(state, issued=state.issued.union(registers)), found
    if line.startswith("wgmma.commit_group"):
        # Without a limit, the states of a loop that awaits nothing would have no end.
        groups = (*state.groups, state.issued)[-MOST_GROUPS:]
        return replace(state, issued=frozenset(), groups=groups), []
    if wait := _WAIT.match(line):
        found = ["a wgmma is awaited before it is committed"] if state.issued else []
        first = max(0, len(state.groups) - int(wait.group(1)))
        # Registers that were awaited may be read and written, so the next wgmma needs a
        # fence again.
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
    # Copies of sums that are carried by a loop do not count: the compiler removes them.
    if not line.startswith("mov."):
        used = _REGISTER.findall(line)
        if not all(group.isdisjoint(used) for group in (state.issued, *state.groups)):
            found.append("a wgmma's sums are used before it is awaited")
    return state, found


def _of_halves(lines: Sequence[str]) -> list[str]:
    """Return a fault if two sparse wgmmas read the same half of a word of positions."""
    halves = Counter(m.groups() for line in lines if (m := _SPARSE.search(line)))
    if any(count > 1 for count in halves.values()):
        return ["sparse wgmmas read the same half of a word of positions"]
    return []


def _of_registers(ptx: str, registers: int) -> list[str]:
    """Return a fault if warpgroups ask for more registers than others gave back.

    Registers at launch are all there are, and a warpgroup that asks for more waits
    forever.
    """
    handed = _HANDED.findall(ptx)
    threads = _THREADS.search(ptx)
    if not handed or threads is None:
        return []
    warpgroups = int(threads.group(1)) // WARPGROUP
    asked = [int(count) for kind, count in handed if kind == "inc"]
    left = [int(count) for kind, count in handed if kind == "dec"]
    # One warpgroup gives registers back, and all others ask for more.
    wanted = max(asked, default=0) * (warpgroups - 1) + max(left, default=registers)
    there = min(registers * warpgroups, REGISTERS // WARPGROUP)
    if asked and wanted > there:
        return [
            f"warpgroups ask for {wanted} registers a thread of each, and there are "
            f"{there}"
        ]
    return []
