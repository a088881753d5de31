"""Saved rows: one schema for all files, and a page of each."""

import json
from importlib import import_module

import pytest

from benchmarks import frame
from benchmarks._harness import COLUMNS, KERNEL, XLA
from benchmarks._report import RESULTS

FILES = sorted(RESULTS.glob("*/*.json"))
TIMED = ("mlp", "flash_mlp", "attention", "estimators", "transformer")
BY = (KERNEL, XLA, "jaxkern", "plain jnp", "naive jnp", "jax.nn", "cudnn", "torch")
PASSES = ("forward", "backward", "forward+backward", "optimizer step", "compiled")


def read(path):
    whole = json.loads(path.read_text())
    return whole["meta"], whole["rows"]


def key_of(row):
    """The labels of a row, which come before its status."""
    names = list(row)[: list(row).index("status")]
    return tuple((name, row[name]) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_has_the_schema(path):
    meta, rows = read(path)
    assert {"device", "jax", "python", "date"} <= meta.keys() and rows
    for row in rows:
        assert tuple(row)[: len(COLUMNS)] == COLUMNS
        assert row["by"].startswith(BY)
        assert row["pass"] in PASSES or row["op"] == "launch"
        assert row["status"] in ("ok", "skipped", "failed")
        assert (row["reason"] is None) == (row["status"] == "ok")
        assert row["dtype"] in ("float32", "bfloat16", "float16")
    assert len({key_of(row) for row in rows}) == len(rows)


def test_rows_of_different_files_join():
    """The same work has the same labels, whichever benchmark and device it is of."""

    def find(name, *but):
        _, rows = read(RESULTS / name)
        joined = {}
        for row in rows:
            labels = dict(key_of(row))
            for label in but:
                labels.pop(label, None)
            joined[tuple(sorted(labels.items()))] = row
        return joined

    cpu = "amd_epyc_2_cores"
    of_dtypes = (find(f"{cpu}/mlp{x}.json", "dtype") for x in ("", "_bfloat16"))
    assert len(set.intersection(*map(set, of_dtypes))) == 45
    # XLA's and our kernels' in the same table; launches were timed apart.
    more = "case", "revision", "grid"
    launches = find("nvidia_h200/launches.json", *more)
    rows = find("nvidia_h200/flash_mlp_quick.json", "grid")
    both = launches.keys() & rows.keys()
    assert len(both) == 16
    for key in both:
        assert launches[key]["device_ms"] == pytest.approx(rows[key]["device_ms"], 0.1)


@pytest.mark.parametrize("name", TIMED)
def test_pages_of_saved_rows(name, tmp_path):
    benchmark = import_module(f"benchmarks.{name}").BENCHMARK
    paths = frame.results(name)
    headings = set()
    for path in paths:
        meta, rows = read(path)
        picture = tmp_path / f"{path.parent.name}_{path.stem}.png"
        page = frame.markdown(benchmark, rows, meta, picture)
        assert ("interrupted" in page) != meta["complete"]
        measured, _, predicted = page.partition("#### Predicted, not measured")
        assert "\n\n| " in measured
        assert measured.count(f"- device: `{meta['device']}") == 1
        assert measured.count(f"- command: `{meta['command']}`") == 1
        # No table is empty, and an indented note belongs to the one above it.
        assert "--: |\n\n" not in page
        assert ("\n    - JAX's: " in page) == ("  JAX's" in meta["notes"])
        assert f"jaxkern {meta['revision']}" in measured
        assert "device:" not in predicted
        drawn = f"({picture.name})" in measured
        assert drawn == picture.exists()
        headings.add(page.splitlines()[0])
    assert len(headings) == len(paths) > 0
