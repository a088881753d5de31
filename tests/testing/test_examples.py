"""The examples of the docstrings run, with a user's own kernels."""

import inspect
import re
import subprocess
import sys

import pytest

from jaxkern import testing
from jaxkern.testing import compiler

PUBLIC = [
    name
    for name, value in vars(testing).items()
    if name == "plain" or name[0] != "_" and not inspect.ismodule(value)
]


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name):
    if name == "compile_for":
        try:
            compiler.tools()
        except testing.MissingCompiler as missing:
            pytest.skip(str(missing))
    doc = inspect.getdoc(getattr(testing, name)) or ""
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", doc, re.DOTALL | re.MULTILINE)
    assert blocks
    for _, block in blocks:
        exec(inspect.cleandoc(block), {"__name__": name})


def test_the_library_imports_neither_testing_nor_the_emulator():
    """And `jaxkern.testing` imports the emulator only where it is asked for."""
    code = """
import sys, jaxkern
assert "jaxkern.testing" not in sys.modules
from jaxkern import testing
with_emulator = [name for name in sys.modules if "testing.emulator." in name]
expected = {"jaxkern.testing.emulator.emulate", "jaxkern.testing.emulator.errors"}
assert set(with_emulator) == expected, with_emulator
"""
    subprocess.run([sys.executable, "-c", code], check=True)
