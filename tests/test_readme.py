import doctest
import re
from pathlib import Path

import pytest

import jaxkern

README = Path("README.md").read_text()
BLOCKS = re.findall(r"```pycon\n(.*?)```", README, flags=re.DOTALL)
TITLES = [block.splitlines()[0].removeprefix(">>> ") for block in BLOCKS]


@pytest.mark.newest
def test_every_example_prints_what_the_readme_says():
    assert len(BLOCKS) >= 5
    failures = []
    # A reader types the blocks in order, so each has the names of those before.
    session = {}
    for title, block in zip(TITLES, BLOCKS, strict=True):
        test = doctest.DocTestParser().get_doctest(block, session, title, None, None)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        runner.run(test, out=failures.append, clear_globs=False)
        session.update(test.globs)
    assert not failures, "".join(failures)


def test_every_public_name_is_in_the_readme():
    ours = [
        name
        for module in (jaxkern, jaxkern.nn)
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", "").startswith("jaxkern.")
    ]
    assert len(ours) >= 13
    assert [name for name in ours if name not in README] == []


def test_every_make_target_is_explained():
    targets = re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE)
    assert [target for target in targets if f"make {target}" not in README] == []
