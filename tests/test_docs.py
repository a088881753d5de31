"""What README, the pages of docs/ and the docstrings show runs, and is complete."""

import contextlib
import doctest
import inspect
import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import jaxkern
import jaxkern.testing

README = Path("README.md")
GENERATED = Path("docs/benchmarks/generated")
PAGES = [
    README,
    *sorted(
        page for page in Path("docs").rglob("*.md") if GENERATED not in page.parents
    ),
]
FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
MODULES = jaxkern, jaxkern.nn, jaxkern.testing
# Of more, a reader is better served by a file in examples/.
MOST_README_LINES = 150


class Block(NamedTuple):
    """A fenced block of a page; `after` is what stands between the last one and it."""

    line: int
    language: str
    text: str
    after: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks in order, of which some are indented in lists or tabs."""
    found, rest, line = [], page.read_text(), 1
    fence = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
    end = 0
    for match in fence.finditer(rest):
        line += rest.count("\n", end, match.start())
        indent, language, text = match.groups()
        text = re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
        found.append(Block(line, language, text, rest[end : match.start()].strip()))
        line += rest.count("\n", match.start(), match.end())
        end = match.end()
    return found


class Example(NamedTuple):
    """Python of a page, and what it prints; None where the page does not say."""

    line: int
    code: str
    output: str | None


def examples_of(page: Path) -> list[Example]:
    """The `python` blocks, each with the `text` block that follows at once."""
    blocks, found = blocks_of(page), []
    for block, following in zip_longest(blocks, blocks[1:]):
        if block.language == "python":
            output = None
            if (
                following
                and following.language == "text"
                and not following.after.strip()
            ):
                output = following.text
            found.append(Example(block.line, block.text, output))
    return found


@contextlib.contextmanager
def as_a_reader() -> Iterator[None]:
    """JAX as it is by default: conftest.py makes it stricter."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.newest
@pytest.mark.parametrize(
    "page", [page for page in PAGES if examples_of(page)], ids=lambda page: str(page)
)
def test_examples_print_what_the_page_says(page):
    # A reader runs the blocks of a page in order.
    session = {"__name__": "__main__"}
    checker = doctest.OutputChecker()
    with as_a_reader():
        for line, code, output in examples_of(page):
            # Lines of a traceback are those of the page.
            program = compile("\n" * line + code, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(program, session)
            if output is not None:
                got = printed.getvalue()
                assert checker.check_output(output, got, FLAGS), (
                    f"{page}:{line} printed\n{got}and the page says\n{output}"
                )


def test_no_block_is_of_a_kind_that_nothing_checks():
    known = {"python", "text", "sh", "bibtex"}
    unknown = [
        f"{page}:{block.line}: {block.language or 'no language'}"
        for page in PAGES
        for block in blocks_of(page)
        if block.language not in known
    ]
    assert unknown == []


def commands() -> list[tuple[str, str]]:
    """The commands of `sh` blocks and of inline code, each with its place."""
    found = []
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "sh":
                text = re.sub(r"\\\n\s*", " ", block.text)
                found += [(f"{page}:{block.line}", line) for line in text.splitlines()]
        inline = re.findall(r"`((?:python|make|sh) [^`]+)`", page.read_text())
        found += [(str(page), line) for line in inline]
    return found


def make_targets() -> list[str]:
    return re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE)


def test_commands_name_what_is_there():
    """Modules, files, make's targets and options."""
    sources = {
        folder: "\n".join(path.read_text() for path in Path(folder).rglob("*.py"))
        for folder in ("benchmarks", "examples", "docs", "tests")
    }
    targets = set(
        re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE)
    )
    faults = []
    assert len(commands()) >= 10
    for place, command in commands():
        command = command.split("  #")[0]
        for module in re.findall(r"python -m (benchmarks\.\w+)", command):
            if not Path(f"{module.replace('.', '/')}.py").exists():
                faults.append(f"{place}: no module {module}")
        for file in re.findall(r"(?:python|sh) ((?:\w+/)+\w+\.\w+)", command):
            if not Path(file).exists():
                faults.append(f"{place}: no file {file}")
        if made := re.match(r"(?:\w+=\S+ )*make (?:\w+=\S+ )*([a-z-]+)", command):
            if made[1] not in targets:
                faults.append(f"{place}: make has no target {made[1]}")
        if ran := re.search(
            r"python (?:-m )?(benchmarks|examples|docs|tests)\b", command
        ):
            for option in re.findall(r" (--[a-z-]+)", command):
                if f'"{option}"' not in sources[ran[1]]:
                    faults.append(f"{place}: {ran[1]} has no option {option}")
    assert faults == []


def public_names() -> list[str]:
    return [
        f"{module.__name__}.{name}"
        for module in MODULES
        for name, value in vars(module).items()
        if name[0] != "_"
        and (
            value is jaxkern.testing.plain
            or not inspect.ismodule(value)
            and name in getattr(module, "__all__", vars(module))
        )
    ]


def test_every_public_name_has_its_place_in_the_api():
    assert len(public_names()) >= 60
    pages = "\n".join(page.read_text() for page in Path("docs/api").glob("*.md"))
    shown = Counter(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    assert shown == Counter(public_names())


def docstring_examples() -> list[doctest.DocTest]:
    """Those of the public names and of their methods, each to be run by itself."""
    found = {}
    for name in public_names():
        module, _, last = name.rpartition(".")
        value = getattr({one.__name__: one for one in MODULES}[module], last)
        if not getattr(value, "__module__", "jaxkern").startswith("jaxkern"):
            continue
        finder = doctest.DocTestFinder(recurse=inspect.isclass(value))
        for test in finder.find(value, name, module=False, globs={}):
            if test.examples:
                found.setdefault(test.name, test)
    return list(found.values())


@pytest.mark.newest
@pytest.mark.parametrize("test", docstring_examples(), ids=lambda test: test.name)
def test_examples_of_docstrings(test):
    if test.name == "jaxkern.testing.compile_for":
        try:
            jaxkern.testing.compiler.tools()
        except jaxkern.testing.MissingCompiler as missing:
            pytest.skip(str(missing))
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    report = []
    with as_a_reader():
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_the_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= MOST_README_LINES


def test_every_make_target_is_explained():
    help_text = Path("Makefile").read_text().split("\n\n")[0]
    assert [name for name in make_targets() if f"make {name}" not in help_text] == [
        "help"
    ]
