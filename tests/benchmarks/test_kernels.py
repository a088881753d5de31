"""Tier 3: kernels compile for sm_90a. `make kernels` does all of them."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _kernels_cases as cases
from benchmarks import kernels
from jaxkern import masked_matmul, pack_mask, reinmax, straight_through
from jaxkern._core import device
from jaxkern._core.activations import ACTIVATIONS
from jaxkern._masked.hopper.product import choose_tiles
from jaxkern._mlp.hopper import flash, flash_tiles, sparse
from jaxkern._mlp.thresholds import dense_kernel
from jaxkern._mosaic.work import GATED_COLUMNS, Work, choose_columns
from jaxkern.testing import MissingCompiler, compiler
from jaxkern.testing import tools as compiler_tools

BF16 = jnp.bfloat16
ALL = tuple(kernels.every_case())


def chosen(form, dim, ups, inputs=1):
    """Names of the cases of a `flash_mlp` with these arguments."""
    names = ("gate", "w1", "w2")[-ups - 1 :]
    launches = {"forward": ["forward"], "backward_x": ["dx"]}
    if inputs == 2:
        launches["backward_x"] = ["dx0 dx1"]
    passes = flash_tiles.weight_passes(dim, ups)
    launches["backward_w"] = [" ".join(f"d{names[n]}" for n in one) for one in passes]
    for kernel, labels in launches.items():
        for config in flash_tiles.configs(kernel, dim, ups, inputs):
            split = " split" if config.split else ""
            size = f"{config.rows}x{config.columns}{split}"
            yield from (f"flash_mlp {form}{label} {dim} {size}" for label in labels)


def padded_dims(largest, **options):
    """Those that kernels are launched with, of all that they take."""
    for dim in range(1, largest + 1):
        shapes = (1, 8, dim), (1, dim, 8)
        x, w1 = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
        assert flash.unsupported(x, w1, **options) is None
        yield flash.padded_sizes(8, dim, 8)[1]


def test_every_configuration_that_can_be_chosen_is_compiled():
    """With silu, and nothing besides."""
    expected = set()
    for dim in padded_dims(256):
        expected.update(chosen("", dim, 1))
    for dim in padded_dims(192, gated=True):
        expected.update(chosen("gated ", dim, 2))
    pairs = set()
    for rank in range(1, 257):
        if dense_kernel((rank, rank)) == "flash_mlp":
            pairs.add(flash.padded_sizes(8, rank, 8)[1])
    assert pairs == {16, 32}
    for dim in pairs:
        expected.update(chosen("pair ", dim, 2, 2))
    others = tuple(f"flash_mlp {name} " for name in ACTIVATIONS if name != "silu")
    names = dict(cases.flash_mlp_cases())
    found = [name for name in names if not name.startswith(others)]
    assert set(found) == expected


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "silu"])
def test_every_tile_of_other_activations_is_compiled(activation):
    expected = {
        *chosen(f"{activation} ", 64, 1),
        *chosen(f"{activation} gated ", 64, 2),
    }
    if activation == "relu2":
        expected.update(chosen("relu2 ", 16, 1), chosen("relu2 ", 32, 1))
    prefix = f"flash_mlp {activation} "
    found = {name for name in dict(cases.flash_mlp_cases()) if name.startswith(prefix)}
    assert found == expected


def test_every_tile_of_masked_products_is_compiled():
    names = dict(cases.masked_cases())
    read = {"forward": "logits", "packing": "logits", "dx": "bits"}
    for samples in (1, 2, 3, 8, 16, 64):
        for seq in (1, 100, 256, 4096):
            for label, name in read.items():
                mask_bytes = 1 / 8 if name == "bits" else 4.0
                config = choose_tiles(samples, seq, 512, 2048, mask_bytes)
                split = " split" if config.splits > 1 else ""
                assert f"masked {label} {config.tokens}{split} {name}" in names


def launched(fn, *args):
    """Names of masked kernels."""
    program = str(jax.make_jaxpr(fn)(*args))
    return set(re.findall(r"masked_(?:product|gradients)\w*", program))


def test_every_launch_of_masked_products_is_compiled(monkeypatch):
    """And none besides, whatever is trained."""
    monkeypatch.setattr(device, "on_hopper", lambda: True)
    compiled = set()
    for name, case in cases.masked_cases():
        # The other tiles have the same name.
        if not re.search(r"(forward|packing|dx) (128|64|256 split)", name):
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

    one_plus_sigmoid = partial(straight_through, derivative="one_plus_sigmoid")

    def own(x):
        return reinmax(x)

    for trained in ((), (0,), (1,), (2,), (0, 2), (0, 1, 2)):
        note(logits, straight_through, trained)
        note(logits, own, trained)
        # Without a gradient of the masks these are as straight-through.
        if 2 in trained:
            note(logits, one_plus_sigmoid, trained)
            note(logits, reinmax, trained)
        if 2 not in trained:
            note(packed, None, trained)
    assert found == compiled


def test_without_the_compiler_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(compiler_tools, "_search", lambda *patterns: None)
    assert kernels.main([]) == 3
    assert "JAX's CUDA plugin must be installed" in capsys.readouterr().err


def test_a_pattern_of_no_kernel_is_refused(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--only", "nothing"])
    message = "--only must be found in the name of a kernel, got 'nothing'"
    assert message in capsys.readouterr().err


@pytest.fixture
def record(tmp_path):
    return tmp_path / "kernels.json"


@pytest.fixture
def compiled(monkeypatch):
    """Kernels a, b and c, whose modules are the values; and what has been compiled.

    What cannot be compiled is bad.
    """
    modules = {"a": b"a", "b": b"b", "c": b"c"}
    done = []

    def compile_module(module, tools, stub):
        done.append(module)
        if module == b"bad":
            raise RuntimeError("does not compile")
        return compiler.CompiledKernel(
            **compiler.count_ptx(PTXAS), smem_bytes=1, instructions={}, seconds=1.0
        )

    def every_case():
        return {name: lambda n=name: (n, ()) for name in modules}

    monkeypatch.setattr(kernels, "every_case", every_case)
    monkeypatch.setattr(kernels, "lower", lambda fn, args: [modules[fn]])
    monkeypatch.setattr(kernels, "fingerprint", lambda module: module.decode())
    monkeypatch.setattr(kernels, "compile_module", compile_module)
    monkeypatch.setattr(kernels, "build_stub", lambda folder: None)
    monkeypatch.setattr(kernels, "tools", lambda: None)
    monkeypatch.setattr(kernels, "versions", lambda tools: {"jax": "1"})
    monkeypatch.setattr(kernels, "sources", lambda: "first")

    return Compiled(modules, done)


class Compiled:
    """A run of the command: its status, and the modules that it compiled."""

    def __init__(self, modules, done):
        self.modules, self.done = modules, done

    def __call__(self, record, *args):
        self.done.clear()
        status = kernels.main(["--json", str(record), *args])
        return status, [module.decode() for module in self.done]


PTXAS = """
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""


def rows_of(record):
    return {kernels.name_of(row): row for row in json.loads(record.read_text())["rows"]}


def test_what_is_unchanged_is_not_compiled_again(compiled, record, monkeypatch):
    assert compiled(record) == (0, ["a", "b", "c"])
    first = record.read_text()
    # Nothing is lowered where no source changed.
    monkeypatch.setattr(kernels, "lower", None)
    assert compiled(record) == (0, [])
    assert record.read_text() == first
    assert compiled(record, "--only", "b") == (0, [])


def test_all_compiles_what_is_unchanged(compiled, record):
    compiled(record)
    assert compiled(record, "--all") == (0, ["a", "b", "c"])


def test_a_changed_module_is_compiled_again(compiled, record, monkeypatch):
    compiled(record)
    compiled.modules["b"] = b"B"
    monkeypatch.setattr(kernels, "sources", lambda: "second")
    assert compiled(record) == (0, ["B"])
    assert rows_of(record)["b"]["module"] == "B"
    assert compiled(record) == (0, [])


def test_other_compilers_compile_everything_again(compiled, record, monkeypatch):
    compiled(record)
    monkeypatch.setattr(kernels, "versions", lambda tools: {"jax": "2"})
    # A row of other compilers is not kept beside one of these.
    assert compiled(record, "--only", "b") == (0, ["b"])
    assert list(rows_of(record)) == ["b"]
    assert compiled(record) == (0, ["a", "c"])


def test_rows_of_some_kernels_do_not_vouch_for_the_others(
    compiled, record, monkeypatch
):
    compiled(record)
    compiled.modules |= {"a": b"A", "b": b"B"}
    monkeypatch.setattr(kernels, "sources", lambda: "second")
    assert compiled(record, "--only", "b") == (0, ["B"])
    assert list(rows_of(record)) == ["a", "b", "c"]
    assert compiled(record) == (0, ["A"])
    # And back: those that were compiled in between are compiled again.
    compiled.modules["b"] = b"b"
    monkeypatch.setattr(kernels, "sources", lambda: "first")
    assert compiled(record) == (0, ["b"])


def test_what_failed_is_compiled_again(compiled, record):
    compiled.modules["b"] = b"bad"
    assert compiled(record) == (1, ["a", "bad", "c"])
    assert rows_of(record)["b"]["reason"] == "RuntimeError: does not compile"
    assert compiled(record) == (1, ["bad"])


def test_rows_stay_when_a_run_is_interrupted(compiled, record, monkeypatch):
    def lower(fn, args):
        if fn == "c":
            raise KeyboardInterrupt
        return [compiled.modules[fn]]

    monkeypatch.setattr(kernels, "lower", lower)
    with pytest.raises(KeyboardInterrupt):
        compiled(record)
    assert list(rows_of(record)) == ["a", "b"]


def test_kernels_that_there_are_no_more_have_no_row(compiled, record):
    compiled(record)
    del compiled.modules["a"]
    assert compiled(record, "--all")[0] == 0
    assert list(rows_of(record)) == ["b", "c"]


def test_no_figure_is_cut_off(compiled, record, monkeypatch, capsys):
    names = sorted(ALL, key=len)[-2:]
    figures = dict.fromkeys(list(kernels.SHOWN.values())[1:], 123456)

    def measure(name, *_):
        op, _, variant = name.partition(" ")
        return {"op": op, "variant": variant, "status": "ok", **figures}

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "every_case", lambda: dict.fromkeys(names))
    assert compiled(record) == (0, [])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("123456") for line in lines) == 2 * len(figures)


def test_a_kernel_that_fails_is_a_failed_row(compiled, tmp_path, monkeypatch):
    def build():
        raise ValueError("rows must be a multiple of 64\nmore")

    monkeypatch.setattr(kernels, "every_case", lambda: {"bad": build})
    row = kernels.measure("bad", kernels.tools(), tmp_path)
    assert kernels.name_of(row) == "bad" and row["status"] == "failed"
    assert row["reason"] == "ValueError: rows must be a multiple of 64"


@pytest.mark.parametrize(
    "path, is_source",
    [
        ("_mosaic/matmul.py", True),
        ("_core/activations.py", True),
        ("testing/compiler.py", False),
        ("testing/tools.py", False),
        ("testing/compiler_process.py", False),
        ("testing/cuda_stub.c", False),
    ],
)
def test_a_changed_byte_is_another_source_or_another_way_to_measure(
    tmp_path, path, is_source
):
    package = tmp_path / "jaxkern"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(kernels.PACKAGE, package, ignore=ignore)
    assert kernels.sources(package) == kernels.sources()
    assert kernels.measuring(package) == kernels.measuring()
    changed = package / path
    changed.write_bytes(changed.read_bytes() + b"\n")
    assert (kernels.sources(package) != kernels.sources()) == is_source
    assert (kernels.measuring(package) != kernels.measuring()) != is_source


def test_this_script_is_a_source_and_a_way_to_measure(tmp_path, monkeypatch):
    before = kernels.sources(), kernels.measuring()
    script = tmp_path / "kernels.py"
    script.write_bytes(Path(kernels.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(kernels, "__file__", str(script))
    after = kernels.sources(), kernels.measuring()
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_another_way_to_measure_compiles_everything_again(
    compiled, record, monkeypatch
):
    compiled(record)
    monkeypatch.setattr(kernels, "measuring", lambda: "second")
    assert compiled(record) == (0, ["a", "b", "c"])
    assert compiled(record) == (0, [])


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
        "T identity 64",
    ],
)
def test_each_kernel_is_one_module(name):
    every = kernels.every_case()
    build = next(b for n, b in every.items() if n.split(" ", 1)[1].startswith(name))
    fn, args = build()
    modules = compiler.lower(fn, args)
    assert len(modules) == 1 and len(modules[0]) > 1000


def test_every_tile_of_low_rank_mlps_is_compiled():
    every = kernels.every_case()
    for tokens in (1, 512, 2048, 16384):
        for rank, hidden in ((64, 128), (512, 8192), (2048, 33024)):
            work = Work(tokens, rank, hidden)
            columns = choose_columns(work)
            names = "relu2 forward", "relu2 backward", "sparse relu2"
            names = *names, "sparse identity", "sparse T identity"
            assert all(f"{name} {columns}" in every for name in names)
            columns = choose_columns(work, GATED_COLUMNS)
            names = "gated forward", "gated forward kept", "gated backward"
            assert all(f"{name} {columns}" in every for name in names)
            columns = choose_columns(work, sparse.SELECT_COLUMNS)
            assert f"select soft kept {columns}" in every


@pytest.fixture
def tools(tmp_path):
    try:
        found = compiler_tools.tools()
    except MissingCompiler as missing:
        pytest.skip(str(missing))
    if not found.disassembler:
        pytest.skip("nvdisasm is not installed")
    compiler_tools.build_stub(tmp_path)
    return found, tmp_path


def test_sparse_products_are_sparse_instructions(tools):
    row = kernels.measure("sparse identity 128", *tools)
    assert row["status"] == "ok", row["reason"]
    assert row["hgmma_sparse"] == row["hgmma"] == row["wgmma"] == 4
    row = kernels.measure("select top2 128", *tools)
    assert row["status"] == "ok", row["reason"]
    assert row["hgmma_sparse"] == 0 < row["hgmma"]


def test_special_functions_are_counted(tools):
    row = kernels.measure("flash_mlp forward 64 64x128", *tools)
    assert row["status"] == "ok", row["reason"]
    # One special function operation for each of the 64 elements a thread has of a tile,
    # before the loop and in it.
    assert row["mufu"] == 2 * 64
    assert row["hgmma"] == row["wgmma"]
