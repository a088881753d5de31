"""The tables and figures of the benchmark pages, made of the committed JSON.

`docs/build.py` writes each into docs/benchmarks/generated/, and the pages include them.
No number of a table is typed into a page.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import frame
from benchmarks._harness import KERNEL, XLA
from benchmarks._report import RESULTS

BENCHMARKS = "mlp", "flash_mlp", "attention", "estimators", "transformer", "compress"
LAUNCHES = RESULTS / "nvidia_h200" / "launches.json"
KERNELS = RESULTS / "sm_90a" / "kernels.json"
CUDNN = "cudnn"

Row = Mapping[str, Any]
Name = Callable[[Row], str]


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, in which all columns but the first are numbers."""
    aligned = [":--", *["--:"] * (len(columns) - 1)]
    rows = [columns, aligned, *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def microseconds(row: Row, key: str) -> str:
    value = round(1000 * row[key], 3)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def pass_of(row: Row) -> str:
    """Return which gradients are made, in the words of the pages."""
    if row["pass"] == "forward":
        return "forward"
    return {"all": "all gradients", "masks": "mask gradients"}.get(
        row.get("trained", ""), "both"
    )


class Launches:
    """Times of one H200 on its first day, by the tree that was measured."""

    def __init__(self, path: Path = LAUNCHES) -> None:
        self.rows: list[Row] = json.loads(path.read_text())["rows"]

    def last(self, ops: Sequence[str], name: Name) -> dict[tuple, dict[str, Row]]:
        """Return the last row of each name and pass, by who computes.

        Later trees come later in the file.
        """
        found: dict[tuple, dict[str, Row]] = {}
        for row in self.rows:
            if row["op"] in ops:
                found.setdefault((name(row), pass_of(row)), {})[row["by"]] = row
        return found

    def compare(self, ops: Sequence[str], other: str, named: str, name: Name) -> str:
        """Return ours beside another, each at the last tree at which it was timed.

        A star says that ours is of a later tree than the other.
        """
        who = other.removeprefix("jaxkern ")
        columns = [named, "pass", "ours", who, "ours / other"]
        columns += ["wall clock, ours", f"wall clock, {who}"]
        lines = []
        for key, by in self.last(ops, name).items():
            if not {KERNEL, other} <= by.keys():
                continue
            ours, theirs = by[KERNEL], by[other]
            star = "" if ours["revision"] == theirs["revision"] else " *"
            lines.append(
                [
                    *key,
                    microseconds(ours, "device_ms") + star,
                    microseconds(theirs, "device_ms"),
                    f"{ours['device_ms'] / theirs['device_ms']:.2f}",
                    microseconds(ours, "time_ms"),
                    microseconds(theirs, "time_ms"),
                ]
            )
        return table(columns, lines)

    def ours(self, ops: Sequence[str], named: str, name: Name) -> str:
        """Return our times, each at the last tree at which it was measured."""
        lines = []
        for key, by in self.last(ops, name).items():
            row = by[KERNEL]
            times = (microseconds(row, x) for x in ("device_ms", "time_ms"))
            lines.append([*key, *times, row["revision"]])
        return table([named, "pass", "us", "wall clock", "tree"], lines)


def attention_shape(row: Row) -> str:
    heads = f"{row['num_heads']}/{row['num_kv_heads']}"
    shape = f"({row['batch']}, {row['seq']}, {heads}, {row['head_dim']})"
    return f"{shape} {row['variant']}"


def launches() -> dict[str, str]:
    """Return the tables of comparisons, by name."""
    timed = Launches()
    return {
        "launches-attention": timed.compare(
            ["attention"], CUDNN, "(batch, seq, heads, dim)", attention_shape
        ),
        "launches-dilated": timed.compare(
            ["dilated_attention"], XLA, "", lambda row: row["op"]
        ),
        "launches-blocks": timed.ours(
            ["block_sparse_attention"], "mask", lambda row: row["variant"]
        ),
        "launches-flash_mlp": timed.compare(
            ["flash_mlp"],
            XLA,
            "(heads, batch, dim, hidden)",
            lambda row: f"{row['shape']} {row['variant']}".strip(),
        ),
        "launches-mlp": timed.compare(
            ["low_rank_relu2", "low_rank_swiglu", "swiglu"],
            XLA,
            "op, model",
            lambda row: f"{row['op']} {row['variant']}".strip() + f", {row['model']}",
        ),
        "launches-masked": timed.compare(
            ["masked_bilinear"], XLA, "samples", lambda row: str(row["batch"])
        ),
    }


def kernels(path: Path = KERNELS) -> dict[str, str]:
    """Return the compiler's counts for each kernel, a table for each family."""
    lines: dict[str, list[list[str]]] = {"flash_mlp": [], "attention": [], "masked": []}
    for row in json.loads(path.read_text())["rows"]:
        name, family = f"{row['op']} {row['variant']}", row["op"]
        spilled = row["spill_stores_bytes"] + row["spill_loads_bytes"]
        counts = row["registers"], spilled, row["smem_bytes"], row["wgmma"]
        counts += row["mufu"], row["instructions"]
        found = lines.setdefault(family if family in lines else "matmuls", [])
        found.append([name, *map(str, counts)])
    columns = ["", "registers", "spilled B", "SMEM B", "wgmma", "MUFU", "instructions"]
    return {f"kernels-{name}": table(columns, found) for name, found in lines.items()}


def reports(folder: Path) -> dict[str, str]:
    """Return the report of each file of rows, and draw its figure into `folder`."""
    found = {}
    for name in BENCHMARKS:
        benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
        for path in frame.results(name):
            saved = json.loads(path.read_text())
            figure = folder / f"{path.parent.name}-{path.stem}.svg"
            text = frame.markdown(benchmark, saved["rows"], saved["meta"], figure)
            # The page that includes this lies above the figure.
            text = text.replace(f"]({figure.name})", f"]({folder.name}/{figure.name})")
            found[figure.stem] = text
    return found
