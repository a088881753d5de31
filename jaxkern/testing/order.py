"""Faults in the order of a kernel's instructions, which no compiler looks for.

The emulator takes an inline function by what it means, and so does not see what it
writes. This reads the PTX of a whole kernel from its first line to its last, as if no
branch were taken, and asks what PTX's documentation asks of wgmma, of copies from
shared memory, and of registers that warpgroups hand to each other. Sources: PTX ISA,
"Asynchronous Warpgroup Level Matrix Instructions", "Async proxy", "setmaxnreg".
"""

import re
from collections import Counter

# Of one multiprocessor; a block's threads share them.
REGISTERS = 65536
WARPGROUP = 128

_COPY = re.compile(r"cp\.async\.bulk(\.tensor\.\dd)?\.global\.shared::cta")
_SPARSE = re.compile(r"wgmma\.mma_async\.sp.*\}, \S+, \S+, (\S+), (\d),")
_SUMS = re.compile(r"wgmma\.mma_async\S*\s+\{([^}]*)\}")
_REGISTER = re.compile(r"%\w+")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")
_HANDED = re.compile(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+)")
_THREADS = re.compile(r"\.(?:req|max)ntid (\d+)")
# A predicate, which some instructions have.
_PREDICATE = re.compile(r"@!?%p\d+\s+")


def faults(ptx: str, registers: int) -> list[str]:
    """Say in a sentence each what is wrong; nothing if nothing is.

    Args:
        ptx: Of one kernel.
        registers: Of one thread at launch.
    """
    return [*_of_wgmma(ptx), *_of_copies(ptx), *_of_registers(ptx, registers)]


def _instructions(ptx: str) -> list[str]:
    return [_PREDICATE.sub("", line.strip()) for line in ptx.splitlines()]


def _of_wgmma(ptx: str) -> list[str]:
    found = []
    is_fenced = False
    # Registers with sums of the wgmmas to be committed, and of each group in flight.
    issued: set[str] = set()
    groups: list[set[str]] = []
    halves: Counter[tuple[str | None, ...]] = Counter()
    for line in _instructions(ptx):
        if line.startswith("wgmma.fence"):
            is_fenced = True
        elif line.startswith("wgmma.mma_async"):
            if not is_fenced:
                found.append("a wgmma has no wgmma.fence before it")
            if sums := _SUMS.match(line):
                issued.update(_REGISTER.findall(sums.group(1)))
            if sparse := _SPARSE.search(line):
                halves[sparse.groups()] += 1
        elif line.startswith("wgmma.commit_group"):
            groups.append(issued)
            issued = set()
        elif wait := _WAIT.match(line):
            if issued:
                found.append("a wgmma is awaited before it is committed")
            # What is awaited may be read and written.
            is_fenced = False
            groups = groups[max(0, len(groups) - int(wait.group(1))) :]
        elif line.startswith("ret;"):
            if issued or groups:
                found.append("a wgmma is not awaited before the kernel ends")
            issued, groups = set(), []
        elif not line.startswith("mov."):
            # Of sums that go round a loop, the compiler removes the copies.
            used = _REGISTER.findall(line)
            if any(not group.isdisjoint(used) for group in (issued, *groups)):
                found.append("a wgmma's sums are used before it is awaited")
    if any(count > 1 for count in halves.values()):
        found.append("sparse wgmmas read the same half of a word of positions")
    return list(dict.fromkeys(found))


def _of_copies(ptx: str) -> list[str]:
    is_seen = False
    for line in _instructions(ptx):
        if line.startswith("fence.proxy.async"):
            is_seen = True
        elif line.startswith("st.shared"):
            is_seen = False
        elif _COPY.match(line) and not is_seen:
            return ["a copy from shared memory has no fence.proxy.async before it"]
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
