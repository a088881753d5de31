"""Tier 3: kernels compile for sm_90a. `make kernels` does all of them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _kernel_compile as compiler
from benchmarks import kernels
from jaxkern import masked_matmul, pack_mask, reinmax, seed_reinmax, straight_through
from jaxkern._masked import masked as _masked
from jaxkern._masked.hopper import multiply as masked
from jaxkern._mlp.hopper import flash as flash_mlp
from jaxkern._mlp.hopper import fused as matmul
from jaxkern._sparsity.hopper import product as sparsity

BF16 = jnp.bfloat16
PTXAS = """
  wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 1;
ptxas info    : Compiling entry function 'flash_mlp_forward' for 'sm_90a'
ptxas info    : Function properties for flash_mlp_forward
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 8 bytes cumulative stack size
"""
CLEAN = {"spill_stores_bytes": 0, "spill_loads_bytes": 0}
CLEAN |= {"serialized": False, "smem_bytes": 1000}


def test_what_is_read_from_the_compiler():
    assert compiler._count_ptx(PTXAS) == {
        "registers": 168,
        "stack_bytes": 8,
        "spill_stores_bytes": 16,
        "spill_loads_bytes": 24,
        "barriers": 16,
        "wgmma": 1,
        "serialized": False,
    }
    with pytest.raises(RuntimeError, match="ptxas printed nothing like"):
        compiler._count_ptx("")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"spill_loads_bytes": 4}, "spills registers: 0 bytes stored, 4 loaded"),
        ({"serialized": True}, "wgmmas run one after the other"),
        ({"smem_bytes": 300_000}, "needs 300000 bytes of shared memory of 232448"),
    ],
)
def test_what_must_not_be_shipped(change, reason):
    got = compiler.problems(CLEAN | change)
    assert got is None if reason is None else got and got.startswith(reason)


def test_every_configuration_that_can_be_chosen_is_compiled():
    cases = kernels.flash_mlp_cases()
    for dim in range(1, 257):
        shapes = (1, 8, dim), (1, dim, 8)
        # NumPy's, as jnp would compile each.
        x, w1 = (jnp.asarray(np.zeros(s, jnp.bfloat16)) for s in shapes)
        assert flash_mlp.unsupported(x, [w1], on_hopper=True) is None
        _, dim, _ = flash_mlp.padded_sizes(8, dim, 8)
        for kernel, label in (("forward", "forward"), ("backward_x", "dx")):
            for config in flash_mlp.configs(kernel, dim, 1):
                split = " split" * config.split
                name = f"flash_mlp {label} {dim} {config.rows}x{config.columns}{split}"
                assert name in cases
        for wanted in flash_mlp.weight_passes(dim, 1):
            label = " ".join(("dw1", "dw2")[n] for n in wanted)
            assert any(name.startswith(f"flash_mlp {label} {dim} ") for name in cases)


def test_every_tile_of_masked_products_is_compiled():
    cases = kernels.masked_cases()
    read = {"forward": "logits", "packing": "logits", "dx": "bits"}
    for samples in (1, 2, 3, 8, 16, 64):
        for seq in (1, 100, 256, 4096):
            for label, name in read.items():
                mask_bytes = 1 / 8 if name == "bits" else 4.0
                config = masked.choose(samples, seq, 512, 2048, mask_bytes)
                split = " split" * (config.splits > 1)
                assert f"masked {label} {config.tokens}{split} {name}" in cases


def launched(fn, *args):
    """Names of masked kernels."""
    program = str(jax.make_jaxpr(fn)(*args))
    return set(re.findall(r"masked_(?:product|gradients)\w*", program))


def test_every_launch_of_masked_products_is_compiled(monkeypatch):
    """And none besides, whatever is trained."""
    monkeypatch.setattr(_masked, "on_hopper", lambda: True)
    compiled = set()
    for case in kernels.masked_cases().values():
        run, args = case()
        compiled |= launched(run, *args)
    x, w = jnp.ones((2, 8, 64), BF16), jnp.ones((64, 64), BF16)
    logits = jnp.ones((2, 64, 64))
    packed = pack_mask(logits)
    found = set()

    def note(masks, estimator, trained):
        def loss(x, w, masks):
            options = {"estimator": estimator, "implementation": "mosaic_gpu"}
            return masked_matmul(x, w, masks, **options).astype(jnp.float32).sum()

        run = jax.grad(loss, trained) if trained else loss
        found.update(launched(run, x, w, masks))

    drawn = partial(reinmax, temperature=1.0)
    for trained in ((), (0,), (1,), (2,), (0, 2), (0, 1, 2)):
        for estimator in (straight_through, seed_reinmax, reinmax, drawn):
            note(logits, estimator, trained)
        if 2 not in trained:
            note(packed, None, trained)
    assert found == compiled


def test_without_the_compiler_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "_search", lambda *patterns: None)
    assert kernels.main([]) == 3
    assert (
        "jax-cuda13-pjrt is not installed: run `make kernels`"
        in capsys.readouterr().err
    )


def test_no_figure_is_cut_off(monkeypatch, capsys):
    names = sorted(kernels.every_case(), key=len)[-2:]
    figures = dict.fromkeys(kernels.COLUMNS.values(), 123456) | {"status": "ok"}
    monkeypatch.setattr(kernels, "requirements", lambda: ("", None))
    monkeypatch.setattr(kernels, "build_stub", lambda folder: None)
    monkeypatch.setattr(kernels, "measure", lambda n, *_: {"kernel": n, **figures})
    monkeypatch.setattr(kernels, "every_case", lambda: dict.fromkeys(names))
    assert kernels.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("123456") for line in lines) == 2 * len(kernels.COLUMNS)


def test_a_kernel_that_fails_is_a_failed_row():
    def build():
        raise ValueError("rows must be a multiple of 64\nmore")

    row = kernels.measure("bad", build, ())
    assert row == {
        "kernel": "bad",
        "status": "failed",
        "reason": "ValueError: rows must be a multiple of 64",
    }


@pytest.mark.parametrize(
    "name",
    [
        "forward 64 128x64",
        "dx 64 64x64 split",
        "gated dgate dw1 64 64x64",
        "dw2 256",
        "forward 128 split bits",
        "dmask dw 64 bits",
        "forward kept 128",
        "soft kept 128",
        "T relu2 64",
    ],
)
def test_each_kernel_is_one_module(name):
    every = kernels.every_case()
    build = next(b for n, b in every.items() if n.split(" ", 1)[1].startswith(name))
    fn, args = build()
    modules = compiler.lower(fn, args)
    assert len(modules) == 1 and len(modules[0]) > 1000


def test_every_tile_of_low_rank_mlps_is_compiled():
    cases = kernels.every_case()
    for tokens in (1, 512, 2048, 16384):
        for rank, hidden in ((64, 128), (512, 8192), (2048, 33024)):
            work = matmul.Work(tokens, rank, hidden)
            columns = matmul.choose_columns(work)
            names = "relu2 forward", "relu2 backward", "matmul NN", "sparse identity"
            assert all(f"{name} {columns}" in cases for name in names)
            columns = matmul.choose_columns(work, matmul.GATED_COLUMNS)
            names = "gated forward", "gated forward kept", "gated backward"
            assert all(f"{name} {columns}" in cases for name in names)
            columns = matmul.choose_columns(work, sparsity.SELECT_COLUMNS)
            assert f"select soft kept {columns}" in cases


@pytest.fixture
def tools(tmp_path):
    try:
        plugin, disassembler = compiler.requirements()
    except compiler.Missing as missing:
        pytest.skip(str(missing))
    compiler.build_stub(tmp_path)
    return plugin, disassembler, tmp_path


def test_sparse_products_are_sparse_instructions(tools):
    cases = kernels.sparse_cases()
    row = kernels.measure("sparse", cases["sparse identity 128"], tools)
    assert row["status"] == "ok", row["reason"]
    if tools[1]:
        assert row["hgmma_sparse"] == row["hgmma"] == row["wgmma"] == 4
    row = kernels.measure("select", cases["select top2 128"], tools)
    assert row["status"] == "ok", row["reason"]
    if tools[1]:
        assert row["hgmma_sparse"] == 0 < row["hgmma"]


def test_compile_one(tools):
    plugin, disassembler, folder = tools
    args = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16)
        for s in ((2, 256, 64), (2, 64, 512), (2, 512, 64))
    ]
    config = flash_mlp.WalkTiles(64, 128)
    (module,) = compiler.lower(flash_mlp.forward("silu", config), tuple(args))
    row = compiler.compile_module(module, plugin, disassembler, folder)
    assert compiler.problems(row) is None
    if disassembler:
        # One special function operation for each of the 64 elements a thread has of a
        # tile, before the loop and in it.
        assert row["mufu"] == 2 * 64
        assert row["hgmma"] == row["wgmma"]
