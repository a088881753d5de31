"""The examples of the docstrings run, with a user's own kernels."""

import doctest
import subprocess
import sys

import pytest

from jaxkern import testing
from jaxkern.testing import compiler, plain

FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


def check(thing, name):
    (example,) = doctest.DocTestFinder(recurse=False).find(thing, name)
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    report = []
    runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", ["relative_error", "assert_as_close", "emulate_gpu"])
def test_example(name):
    check(getattr(testing, name), name)


def test_example_of_plain_forms():
    check(plain, "plain")


def test_example_of_the_compiler():
    try:
        compiler.tools()
    except testing.MissingCompiler as missing:
        pytest.skip(str(missing))
    check(testing.compile_for, "compile_for")


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
