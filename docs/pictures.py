"""Draw every BlockMask of the page on block masks, from the code on that page.

    python docs/pictures.py

The page's Python blocks run in order. Each global name that then is a BlockMask becomes
a file of that name in docs/guides/pictures, which the page shows. The colours stand out
from a light page as well as from a dark one; the background is transparent.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from jaxkern import BlockMask

GUIDES = Path(__file__).parent / "guides"
PAGE, FOLDER = GUIDES / "block-masks.md", GUIDES / "pictures"
# The sizes of a block, of the gap between two, and of the margin of a picture.
SIZE, GAP, MARGIN = 10, 1, 15
# Okabe and Ito's blue and orange, which colour-blind people can tell apart.
COLOURS = {"#": "#0072b2", "+": "#e69f00", ".": "#808080"}
EMPTY_OPACITY = 0.25


def run(page: Path) -> dict[str, Any]:
    """The names that the Python blocks of a page define."""
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in re.findall(
            r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S
        ):
            exec(block, names)
    return names


def draw(name: str, mask: BlockMask) -> str:
    """An SVG of the mask's last head: a square for each block, one path a colour."""
    states = mask.to_string(head=mask.shape[1] - 1, width=max(mask.grid)).split("\n")
    rows, columns = mask.grid
    title = f"{name}: {mask!r}"
    parts = []
    for mark, colour in COLOURS.items():
        corners = np.argwhere(np.array([list(row) for row in states]) == mark)
        side = SIZE - GAP
        path = "".join(
            f"M{SIZE * j} {SIZE * i}h{side}v{side}h-{side}z" for i, j in corners
        )
        opacity = f' fill-opacity="{EMPTY_OPACITY}"' if mark == "." else ""
        if path:
            parts.append(f'<path fill="{colour}"{opacity} d="{path}"/>')
    width, height = (SIZE * n - GAP + MARGIN for n in (columns, rows))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
            f'height="{height}" viewBox="0 0 {width} {height}">',
            f"<title>{escape(title)}</title>",
            *parts,
            "</svg>\n",
        ]
    )


def pictures() -> dict[str, str]:
    """By name, of all masks of the page that it shows."""
    masks = {k: v for k, v in run(PAGE).items() if isinstance(v, BlockMask)}
    shown = re.findall(r"\(pictures/(\w+)\.svg\)", PAGE.read_text())
    return {name: draw(name, masks[name]) for name in shown}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.svg"):
        old.unlink()
    for name, svg in pictures().items():
        (FOLDER / f"{name}.svg").write_text(svg)
        print(f"{FOLDER / name}.svg")


if __name__ == "__main__":
    main()
