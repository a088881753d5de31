"""The examples of README, docs/ and docstrings run, and the pages are complete."""

import contextlib
import doctest
import inspect
import io
import re
import types
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import jaxkern
import jaxkern.testing
from docs import check, tables

README = Path("README.md")
GENERATED = Path("docs/benchmarks/generated")
WRITTEN = [page for page in Path("docs").rglob("*.md") if GENERATED not in page.parents]
PAGES = [README, *sorted(WRITTEN)]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
MODULES = jaxkern, jaxkern.compress, jaxkern.models, jaxkern.nn, jaxkern.testing
MEMBERS = types.FunctionType, property, staticmethod, classmethod
MOST_README_LINES = 150

# The meaning of fenced blocks in each language.
LANGUAGES = {
    "python": "runs here; the text that follows at once is what it prints",
    "text": "that, or what a command or another machine printed, or a drawing",
    "sh": "commands, whose modules, files, targets and options exist",
}


class Block(NamedTuple):
    """A fenced block of a page; `before` is the text that precedes it."""

    line: int
    language: str
    text: str
    before: str


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks in order; lists and tabs indent some of them."""
    found, end = [], 0
    for match in FENCE.finditer(text):
        indent, language, code = match.groups()
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(line, language, code, text[end : match.start()].strip()))
        end = match.end()
    return found


class Example(NamedTuple):
    """Python of a page or docstring, and what it prints; None if it does not say."""

    line: int
    code: str
    output: str | None


def examples_of(text: str) -> list[Example]:
    """Return the blocks of Python, each with the output that follows it."""
    blocks, found = blocks_of(text), []
    for block, following in zip_longest(blocks, blocks[1:]):
        if block.language == "python":
            prints = following and following.language == "text" and not following.before
            output = following.text if following and prints else None
            found.append(Example(block.line, block.text, output))
    return found


@contextlib.contextmanager
def as_a_reader() -> Iterator[None]:
    """Give JAX its default options, which conftest.py makes stricter."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def run_examples(name: str, text: str) -> None:
    """Run the blocks of a page or of a docstring in order, as a reader would."""
    session = {"__name__": "__main__"}
    for line, code, output in examples_of(text):
        # The empty lines give a traceback the line numbers of the page.
        program = compile("\n" * line + code, name, "exec")
        with as_a_reader(), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, session)
        got = printed.getvalue()
        assert output is None or doctest.OutputChecker().check_output(
            output, got, FLAGS
        ), f"{name}:{line} printed\n{got}and not\n{output}"


@pytest.mark.newest
@pytest.mark.parametrize(
    "page", [page for page in PAGES if examples_of(page.read_text())], ids=str
)
def test_examples_print_what_the_page_says(page):
    run_examples(str(page), page.read_text())


def test_an_example_that_prints_something_else_fails():
    text = "```python\nprint(6 * 7)\n```\n\n```text\n{}\n```\n"
    run_examples("page.md", text.format(42))
    with pytest.raises(AssertionError, match=r"page.md:1 printed\s+42\s"):
        run_examples("page.md", text.format(43))


def test_every_block_is_of_a_kind_that_is_checked():
    texts = {str(page): page.read_text() for page in PAGES} | docstrings()
    unknown = [
        f"{name}:{block.line}: {block.language}"
        for name, text in texts.items()
        for block in blocks_of(text)
        if block.language not in LANGUAGES or block.text.startswith(">>>")
    ]
    assert unknown == []


def commands() -> list[tuple[str, str]]:
    """The commands of `sh` blocks and of inline code, each with its place."""
    found = []
    for page in PAGES:
        for block in blocks_of(page.read_text()):
            if block.language == "sh":
                text = re.sub(r"\\\n\s*", " ", block.text)
                found += [(f"{page}:{block.line}", line) for line in text.splitlines()]
        inline = re.findall(r"`((?:python|make|sh) [^`]+)`", page.read_text())
        found += [(str(page), line) for line in inline]
    return [(place, command.split("  #")[0]) for place, command in found]


def make_targets() -> list[str]:
    return re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE)


def faults_of(command: str) -> Iterator[str]:
    """Yield the modules, files, targets and options of a command that do not exist."""
    for module in re.findall(r"python -m (benchmarks\.\w+)", command):
        if not Path(f"{module.replace('.', '/')}.py").exists():
            yield f"no module {module}"
    for file in re.findall(r"(?:python|sh) ((?:\w+/)+\w+\.\w+)", command):
        if not Path(file).exists():
            yield f"no file {file}"
    made = re.match(r"(?:\w+=\S+ )*make (?:\w+=\S+ )*([a-z-]+)", command)
    if made and made[1] not in make_targets():
        yield f"make has no target {made[1]}"
    program = re.search(r"python (?:-m )?(benchmarks|examples|docs|tests)\b", command)
    if program:
        files = Path(program[1]).rglob("*.py")
        source = "\n".join(path.read_text() for path in files) + '"--help"'
        for option in re.findall(r" (--[a-z-]+)", command[program.end() :]):
            # argparse makes the negative form of a flag.
            if f'"{option.replace("--no-", "--")}"' not in source:
                yield f"{program[1]} has no option {option}"


def test_commands_name_what_is_there():
    assert len(commands()) >= 10
    found = [
        (p, command, fault) for p, command in commands() for fault in faults_of(command)
    ]
    assert found == []


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


def docstrings() -> dict[str, str]:
    """Return the docstrings of the public names and of the members of classes."""
    modules, found = {one.__name__: one for one in MODULES}, {}
    for name in public_names():
        module, _, last = name.rpartition(".")
        value = getattr(modules[module], last)
        if not getattr(value, "__module__", "jaxkern").startswith("jaxkern"):
            continue
        found[name] = inspect.getdoc(value) or ""
        for owner in inspect.getmro(value)[:-1] if inspect.isclass(value) else ():
            if owner.__module__.startswith("jaxkern"):
                place = name if owner is value else owner.__qualname__
                found[place] = inspect.cleandoc(owner.__doc__ or "")
                for member, of in vars(owner).items():
                    if isinstance(of, MEMBERS):
                        found[f"{place}.{member}"] = inspect.getdoc(of) or ""
    return found


@pytest.mark.newest
@pytest.mark.parametrize(
    "name", [name for name, text in docstrings().items() if examples_of(text)]
)
def test_examples_of_docstrings(name):
    if name == "jaxkern.testing.compile_for":
        try:
            jaxkern.testing.tools.tools()
        except jaxkern.testing.MissingCompiler as missing:
            pytest.skip(str(missing))
    run_examples(name, docstrings()[name])


def test_every_public_name_has_an_example():
    found = docstrings()
    missing = [name for name in public_names() if not examples_of(found[name])]
    # A tuple has no docstring of its own.
    assert missing == ["jaxkern.nn.SHARDING_RULES"]


# A packed format, a cache or a mesh has no paper, and a container nothing to raise.
LACKING = {
    "jaxkern.BlockMask": ("Args:", "Raises:"),
    "jaxkern.Packed24": ("$", "Args:", "Raises:"),
    "jaxkern.PackedMask": ("$", "Args:", "Raises:", "References:"),
    "jaxkern.pack_mask": ("References:",),
    "jaxkern.unpack_mask": ("References:",),
    "jaxkern.compress.LayerReport": ("Args:", "Raises:", "References:"),
    "jaxkern.compress.Report": ("$", "Args:", "Raises:", "References:"),
    "jaxkern.models.load": ("$",),
    "jaxkern.models.load_native": ("$",),
    "jaxkern.models.read_config": ("$",),
    "jaxkern.models.save": ("$",),
    "jaxkern.models.save_native": ("$",),
    "jaxkern.nn.KVCache": ("$", "Args:", "Raises:", "References:"),
    "jaxkern.nn.MaskLogits": ("Args:", "Raises:", "References:"),
    "jaxkern.nn.PackedWeight": ("$", "Args:", "Raises:", "References:"),
    "jaxkern.nn.SHARDING_RULES": ("$", "Args:", "Raises:", "References:"),
    "jaxkern.nn.TransformerConfig": ("$",),
    "jaxkern.nn.get_sharding": ("$",),
    "jaxkern.nn.mask_sparsity": ("Raises:", "References:"),
    "jaxkern.nn.parse_mesh_sizes": ("$", "References:"),
}


def test_every_docstring_has_formula_arguments_errors_and_source():
    parts, found = ("$", "Args:", "Raises:", "References:"), docstrings()
    names = [name for name in public_names() if "testing" not in name]
    lacking = {
        name: tuple(part for part in parts if part not in found.get(name, ""))
        for name in names
    }
    assert {name: those for name, those in lacking.items() if those} == LACKING


def test_faults_of_a_page_are_found(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<link rel="stylesheet" href="https://fonts.example/x.css">'
        '<a href="other.html#there"></a><img src="none.png"><p>$x$ <code>$y$</code></p>'
        '<a href="page.html"></a><span class="arithmatex">\\(x^2\\)</span>'
        '<div class="arithmatex">\\[\\wrong\\]</div>'
    )
    read = check.Page(page)
    assert read.formulas == ["\\(x^2\\)", "\\[\\wrong\\]"]
    katex = tmp_path / "katex.js"
    katex.write_text(
        "exports.renderToString = (formula, {displayMode, strict}) => {"
        '  if (formula !== "x^2") throw Error([formula, displayMode, strict]);'
        "};"
    )
    assert check.site_faults(tmp_path, katex) == [
        "page.html: Markdown sees no formula in '$x$'",
        "page.html: a browser would load https://fonts.example/x.css",
        "page.html: none.png does not exist",
        "page.html: other.html#there does not exist",
        "page.html: \\wrong,true,error",
    ]
    assert check.navigation_faults(["a.md", {"B": ["b.md"]}], ["a.md", "c.md"]) == [
        "mkdocs.yml: no entry for c.md",
        "mkdocs.yml: no page b.md",
    ]


def test_links_of_the_readme_lead_somewhere():
    """`make docs` checks the links of the pages."""
    targets = re.findall(r"\]\(([^)#]+)", README.read_text())
    files = [target for target in targets if not target.startswith("https://")]
    assert len(files) >= 5
    assert [file for file in files if not Path(file).exists()] == []


def test_the_readme_measures_what_the_benchmark_pages_do():
    def cells(line):
        return tuple(cell.strip() for cell in line.strip("|\n").split("|"))[1:]

    made = "".join(tables.launches().values()).splitlines()
    shown = re.findall(r"^\| (?:XLA|cuDNN).*$", README.read_text(), re.MULTILINE)
    assert len(shown) >= 5
    assert [line for line in shown if cells(line) not in map(cells, made)] == []


def test_the_readme_is_one_page():
    assert len(README.read_text().splitlines()) <= MOST_README_LINES


def test_every_make_target_is_explained():
    help_text = Path("Makefile").read_text().split("\n\n")[0]
    missing = [name for name in make_targets() if f"make {name}" not in help_text]
    assert missing == ["help"]
