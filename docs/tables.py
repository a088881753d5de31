"""The tables of the benchmark pages, made of the committed JSON.

`docs/build.py` writes each into docs/benchmarks/generated/, and the pages include them.
No number of a table is typed into a page.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAUNCHES = RESULTS / "nvidia_h200" / "launches.json"
KERNELS = RESULTS / "sm_90a" / "kernels.json"

Row = Mapping[str, Any]
PASSES = {"fwd": "forward", "fwd+bwd": "both"}
OURS = "mosaic_gpu"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, of which all columns but the first are aligned as numbers."""
    aligned = [":--", *["--:"] * (len(columns) - 1)]
    rows = [columns, aligned, *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def microseconds(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    value = round(1e3 * milliseconds, 3)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


class Launches:
    """What one H200 took on its first day, by the tree that was measured."""

    def __init__(self, path: Path = LAUNCHES) -> None:
        self.rows: list[Row] = json.loads(path.read_text())["rows"]

    def compare(self, pattern: str, other: str, *, named: str = "") -> str:
        """Ours beside another, each at the last tree at which it was timed.

        A star says that ours is of a later tree than the other.

        Args:
            pattern: Of the cases, with groups for what names a row and for the pass,
                and `BY` where the case says who computes.
            other: Who computes beside us.
            named: The head of the column that names a row.
        """
        cases: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.rows:
            for by in (OURS, other):
                if match := re.fullmatch(pattern.replace("BY", by), row["case"]):
                    name, which = match.groups()
                    # Later trees come later.
                    cases.setdefault((name, which), {})[by] = row
        columns = [named, "pass", "ours", other, "ours / other"]
        columns += ["wall clock, ours", f"wall clock, {other}"]
        lines = []
        for (name, which), by in cases.items():
            if len(by) < 2:
                continue
            ours, theirs = by[OURS], by[other]
            again = "" if ours["revision"] == theirs["revision"] else " *"
            lines.append(
                [
                    name,
                    PASSES.get(which, which),
                    microseconds(ours["device_ms"]) + again,
                    microseconds(theirs["device_ms"]),
                    f"{ours['device_ms'] / theirs['device_ms']:.2f}",
                    microseconds(ours["time_ms"]),
                    microseconds(theirs["time_ms"]),
                ]
            )
        return table(columns, lines)

    def ours(self, pattern: str, *, named: str = "") -> str:
        """Times of our launches, at the last tree at which each was timed."""
        found: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            if match := re.fullmatch(pattern, row["case"]):
                name, which = match.groups()
                found[name, which] = row
        lines = [
            [
                name,
                PASSES.get(which, which),
                microseconds(row["device_ms"]),
                microseconds(row["time_ms"]),
                row["revision"],
            ]
            for (name, which), row in found.items()
        ]
        return table([named, "pass", "us", "by wall clock", "tree"], lines)


def kernels(path: Path = KERNELS) -> dict[str, str]:
    """What the compiler says of each kernel, by family."""
    lines: dict[str, list[list[str]]] = {"flash_mlp": [], "attention": [], "masked": []}
    for row in json.loads(path.read_text())["rows"]:
        name = f"{row['op']} {row['variant']}"
        family = name.split()[0]
        spilled = row["spill_stores_bytes"] + row["spill_loads_bytes"]
        counts = row["registers"], spilled, row["smem_bytes"], row["wgmma"]
        counts += row["mufu"], row["instructions"]
        found = lines.setdefault(family if family in lines else "matmuls", [])
        found.append([name, *map(str, counts)])
    columns = ["", "registers", "spilled B", "SMEM B", "wgmma", "MUFU", "instructions"]
    return {f"kernels-{name}": table(columns, found) for name, found in lines.items()}


def launches() -> dict[str, str]:
    """The comparisons that the pages show, by name."""
    timed = Launches()
    return {
        "launches-attention": timed.compare(
            r"attn (\(.+\) \w+) BY (\S+)", "cudnn", named="(batch, seq, heads, dim)"
        ),
        "launches-dilated": timed.compare(r"(dilated) BY (\S+)", "xla"),
        "launches-blocks": timed.ours(r"blocks (\S+) (\S+)", named="mask"),
        "launches-flash_mlp": timed.compare(
            r"flash ((?:gated )?\(.+\)) BY (\S+)",
            "xla",
            named="(heads, batch, dim, hidden)",
        ),
        "launches-mlp": timed.compare(
            r"((?:\d+\w (?:relu2 \S+|gated))|swiglu 7B 8192) BY (\S+)",
            "xla",
            named="model, MLP",
        ),
        "launches-masked": timed.compare(r"masked (b\d+) BY (.+)", "bmm"),
    }
