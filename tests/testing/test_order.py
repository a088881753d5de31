"""`order.faults` names what is wrong in the order of instructions, and nothing else."""

from functools import partial

import pytest

from jaxkern.testing import order

FENCE = "wgmma.fence.sync.aligned;"
COMMIT = "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
STORED = "st.shared.b32 [%rd9], %r9;"
PROXY = "fence.proxy.async.shared::cta;"
COPY = (
    "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd1, {%r1}], [%r2];"
)
INCREASE = "@%p1 setmaxnreg.inc.sync.aligned.u32 240;"
KIND = "wgmma.mma_async{}.sync.aligned.m64n8k32.f32.bf16.bf16 {{%f1, %f2}}, %rd1, %rd2"


def sparse(word: str, selector: int) -> str:
    return f"{KIND.format('.sp')}, {word}, {selector}, 1, 1, 1, 0, 1;"


KERNEL = [
    ".maxntid 384, 1, 1",
    INCREASE,
    "mov.b32 %f1, 0f00000000;",
    FENCE,
    sparse("%r1", 0),
    sparse("%r1", 1),
    COMMIT,
    WAIT,
    "add.f32 %f3, %f1, %f2;",
    FENCE,
    f"{KIND.format('')}, p, 1, 1, 0, 1;",
    COMMIT,
    "mov.b32 %f4, %f1;",
    "wgmma.wait_group.sync.aligned 1;",
    WAIT,
    STORED,
    PROXY,
    COPY,
    "setmaxnreg.dec.sync.aligned.u32 24;",
    "@%p2 ret;",
]


def faults(lines, registers=168):
    return order.faults("\n".join(f"\t{line}" for line in lines), registers)


def without(line, occurrence=0):
    at = [i for i, other in enumerate(KERNEL) if other == line][occurrence]
    return [*KERNEL[:at], *KERNEL[at + 1 :]]


def with_line(line, after, occurrence=0):
    at = [i for i, other in enumerate(KERNEL) if other == after][occurrence] + 1
    return [*KERNEL[:at], line, *KERNEL[at:]]


def replaced_in(lines, old, new):
    return [new if line == old else line for line in lines]


replaced = partial(replaced_in, KERNEL)


def test_nothing_is_wrong():
    assert faults(KERNEL) == []
    # If warpgroups do not hand over registers, a thread may have any number of them.
    handing = ("setmaxnreg", "@%p1 setmaxnreg")
    assert faults([one for one in KERNEL if not one.startswith(handing)], 32) == []


def test_branches_are_followed():
    """The text of a wait may come before its loop, and every way out must have one."""
    loop = [
        "bra.uni $L__BB0_2;",
        "$L__BB0_1:",
        WAIT,
        "ret;",
        "$L__BB0_2:",
        FENCE,
        f"{KIND.format('')}, p, 1, 1, 0, 1;",
        COMMIT,
        "@%p2 bra $L__BB0_2;",
        "bra.uni $L__BB0_1;",
    ]
    assert faults(loop) == []
    ends = replaced_in(loop, "@%p2 bra $L__BB0_2;", "@%p2 ret;")
    assert faults(ends) == ["a wgmma is not awaited before the kernel ends"]


USED = "a wgmma's sums are used before it is awaited"


@pytest.mark.parametrize(
    "lines, found",
    [
        (without(FENCE, 0), ["a wgmma has no wgmma.fence before it"]),
        # The sums may have been written to since the last wait.
        (without(FENCE, 1), ["a wgmma has no wgmma.fence before it"]),
        (without(COMMIT, 0), ["a wgmma is awaited before it is committed", USED]),
        (without(WAIT, 0), [USED]),
        (without(WAIT, 1), ["a wgmma is not awaited before the kernel ends"]),
        (with_line("add.f32 %f9, %f2, %f2;", after=COMMIT, occurrence=1), [USED]),
        (
            replaced(sparse("%r1", 1), sparse("%r1", 0)),
            ["sparse wgmmas read the same half of a word of positions"],
        ),
        (
            without(PROXY),
            ["a copy from shared memory has no fence.proxy.async before it"],
        ),
        (
            with_line(STORED, after=PROXY),
            ["a copy from shared memory has no fence.proxy.async before it"],
        ),
        (
            replaced(INCREASE, INCREASE.replace("240", "248")),
            ["warpgroups ask for 520 registers a thread of each, and there are 504"],
        ),
    ],
)
def test_what_is_wrong_is_said(lines, found):
    assert faults(lines) == found


def test_a_block_has_no_more_registers_than_the_multiprocessor():
    (found,) = faults(replaced(INCREASE, INCREASE.replace("240", "248")), 255)
    assert "ask for 520" in found and "there are 512" in found
