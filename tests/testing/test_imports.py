"""`import jaxkern` imports nothing that only tests need."""

import subprocess
import sys


def test_the_library_imports_neither_testing_nor_the_emulator():
    """`jaxkern.testing` imports the emulator only when it is used."""
    code = """
import sys, jaxkern
assert "jaxkern.testing" not in sys.modules
from jaxkern import testing
with_emulator = [name for name in sys.modules if "testing.emulator." in name]
expected = {"jaxkern.testing.emulator.emulate", "jaxkern.testing.emulator.errors"}
assert set(with_emulator) == expected, with_emulator
"""
    subprocess.run([sys.executable, "-c", code], check=True)
