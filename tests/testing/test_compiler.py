"""`compile_for`: what it reads from the compiler, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxkern._mosaic.base import plgpu
from jaxkern.testing import (
    CompiledKernel,
    MissingCompiler,
    compile_for,
    compiler,
    tools,
)

X = jax.ShapeDtypeStruct((128,), jnp.float32)
PTXAS = """
  wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 1;
ptxas info    : Compiling entry function 'flash_mlp_forward' for 'sm_90a'
ptxas info    : Function properties for flash_mlp_forward
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 8 bytes cumulative stack size
"""
SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 MUFU.EX2 R2, R2 ;
        /*0020*/                   MUFU.TANH R2, R2 ;
        /*0030*/                   HGMMA.SP.64x128x32.F32.BF16 R24, gdesc[UR8] ;
        /*0040*/         @P1 BRA `(.L_x_3) ;
        /*0050*/                   MUFUX R1 ;
.L_x_3:
"""
CLEAN = CompiledKernel(
    registers=168,
    stack_bytes=0,
    spill_stores_bytes=0,
    spill_loads_bytes=0,
    smem_bytes=1000,
    barriers=1,
    wgmma=0,
    is_serialized=False,
    instructions=compiler.count_sass(SASS),
    seconds=1.0,
)


def test_what_is_read_from_the_compiler():
    assert compiler.count_ptx(PTXAS) == {
        "registers": 168,
        "stack_bytes": 8,
        "spill_stores_bytes": 16,
        "spill_loads_bytes": 24,
        "barriers": 16,
        "wgmma": 1,
        "is_serialized": False,
    }
    with pytest.raises(RuntimeError, match="ptxas printed nothing like"):
        compiler.count_ptx("")


def test_instructions_are_counted_by_name():
    names = "", "MUFU", "MUFU.TANH", "HGMMA", "HGMMA.SP", "HGMMA.S", "BRA", "LDC"
    assert [CLEAN.count(name) for name in names] == [6, 2, 1, 1, 1, 0, 1, 1]


def test_nothing_is_counted_without_the_disassembler():
    unread = dataclasses.replace(CLEAN, instructions=None)
    message = "CompiledKernel.count: nvdisasm .* must be .*'jaxkern-fused\\[testing\\]'"
    with pytest.raises(MissingCompiler, match=message):
        unread.count("MUFU")


@pytest.mark.parametrize(
    "body, limit, message",
    [
        ("pass", 60, "the driver's stub must write smem, and has not: it said"),
        (
            "raise SystemExit('FAILED: no such wgmma')",
            60,
            "not compile: FAILED: no such wgmma",
        ),
        ("raise SystemExit('bad ' * 200)", 60, "does not compile: (bad )*bad$"),
        ("while True: pass", 0.5, "took more than 0.5 s: it said nothing"),
    ],
    ids=["writes nothing", "names its error", "has last words", "is too slow"],
)
def test_how_a_compiler_fails(body, limit, message, monkeypatch, tmp_path):
    (tmp_path / "compiler_process.py").write_text(body)
    monkeypatch.setattr(compiler, "HERE", tmp_path)
    monkeypatch.setattr(tools, "TIMEOUT_SECONDS", limit)
    found = tools.Tools(*[tmp_path / "bin" / "tool"] * 5)
    with pytest.raises(RuntimeError, match=message):
        compiler.compile_module(b"", found, tmp_path)


def test_the_last_words_of_a_tool_that_fails(tmp_path):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho no such file >&2; exit 2\n")
    tool.chmod(0o755)
    with pytest.raises(RuntimeError, match="tool failed: no such file"):
        compiler._count_sass(tool, tmp_path)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"spill_loads_bytes": 4}, "spills registers: 0 bytes stored, 4 loaded"),
        ({"is_serialized": True}, "wgmmas run one after the other"),
        ({"smem_bytes": 300_000}, "needs 300000 bytes of shared memory of 232448"),
    ],
)
def test_what_must_not_be_shipped(change, reason):
    got = dataclasses.replace(CLEAN, **change).problem()
    assert got is None if reason is None else got and got.startswith(reason)


def test_another_chip_is_refused():
    message = "compile_for: arch must be one of 'sm_90a', got 'sm_100a'"
    with pytest.raises(ValueError, match=message):
        compile_for("sm_100a", jnp.sin, X)


@pytest.mark.parametrize(
    "missing, message",
    [
        (
            "jax_plugins",
            r"CUDA plugin must be installed: .* jax-cuda13-pjrt==.*JAXKERN",
        ),
        ("ptxas", r"ptxas \(nvidia-cuda-nvcc\) must be .*'jaxkern-fused\[testing\]'"),
        (
            "libdevice",
            r"libdevice \(nvidia-nvvm\) must be .*'jaxkern-fused\[testing\]'",
        ),
        (
            "libcudart",
            r"libcudart .*cuda-runtime\) must be .*'jaxkern-fused\[testing\]'",
        ),
        ("gcc", "a C compiler, gcc or cc, must be installed"),
    ],
)
def test_what_is_not_installed_is_named(missing, message, monkeypatch, tmp_path):
    def search(*patterns):
        found = not any(missing in pattern for pattern in patterns)
        return tmp_path if found else None

    monkeypatch.setattr(tools, "_search", search)
    monkeypatch.setattr(tools, "_c_compiler", lambda: missing != "gcc")
    with pytest.raises(MissingCompiler, match=message):
        compile_for("sm_90a", jnp.sin, X)


def test_packages_are_found_in_the_named_folder(monkeypatch, tmp_path):
    path = tmp_path / "nvidia/cu99/bin/ptxas"
    path.parent.mkdir(parents=True)
    path.touch()
    assert tools._search("nvidia/cu99/bin/ptxas") is None
    monkeypatch.setenv("JAXKERN_COMPILER", str(tmp_path))
    assert tools._search("nvidia/cu*/bin/ptxas") == path


def times(factor, comment):
    """Return a kernel whose source follows so many lines of comment."""
    source = """
def kernel(x_gmem, y_gmem):
    y_gmem[...] = factor * x_gmem[...]
"""
    names = {"factor": factor}
    exec(compile("#\n" * comment + source, f"file_{comment}.py", "exec"), names)
    out = jax.ShapeDtypeStruct(X.shape, X.dtype)
    return plgpu.kernel(names["kernel"], out_type=out)


@pytest.mark.newest
def test_a_fingerprint_depends_on_the_kernel_and_not_on_where_it_is():
    def fingerprint(factor, comment):
        (module,) = compiler.lower(times(factor, comment), (X,))
        return compiler.fingerprint(module), module

    (first, module), (moved, other) = fingerprint(2, 0), fingerprint(2, 7)
    assert module != other
    assert first == moved
    assert fingerprint(3, 0)[0] != first


def test_a_function_that_launches_no_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(compiler, "tools", lambda: None)
    message = "compile_for: fn must launch exactly one kernel, got 0"
    with pytest.raises(ValueError, match=message):
        compile_for("sm_90a", jnp.sin, X)
