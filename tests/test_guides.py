"""Numbers that the guides quote are measured, and their pictures are drawn."""

import json
import re
from pathlib import Path

GUIDES = Path("docs/guides")
LAUNCHES = Path("benchmarks/results/nvidia_h200/launches.json")


def test_times_of_the_guides_are_measured_ones():
    """Those of kernels against XLA, and beside cuDNN: "a against b" and "a / b"."""
    rows = json.loads(LAUNCHES.read_text())["rows"]
    measured = {round(1e3 * row["device_ms"]) for row in rows}
    page = (GUIDES / "implementations.md").read_text()
    pairs = re.findall(r"(\d+) (?:against|/) (\d+)", page)
    assert len(pairs) >= 25
    times = {int(time) for pair in pairs for time in pair}
    assert times <= measured


def test_pictures_are_those_that_pages_show():
    """`make pictures` draws them."""
    text = "\n".join(page.read_text() for page in GUIDES.glob("*.md"))
    shown = set(re.findall(r"\(pictures/(\w+)\.svg\)", text))
    assert len(shown) >= 10
    assert shown == {path.stem for path in (GUIDES / "pictures").glob("*.svg")}
