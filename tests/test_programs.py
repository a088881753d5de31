"""The exit status of benchmarks and examples, whatever reads their output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = [
    path
    for folder in ("benchmarks", "examples")
    for path in Path(folder).glob("[a-z]*.py")
    if '\nif __name__ == "__main__":' in path.read_text()
]
each = pytest.mark.parametrize("module", ["benchmarks._cli", "examples._program"])
START = "from {module} import run_program\ndef main():\n"


def start(module, body, stdout, **settings):
    command = [sys.executable, "-c", START.format(module=module) + body]
    environment = os.environ | {"PYTHONPATH": "."} | settings
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


@each
def test_a_character_that_the_encoding_lacks_ends_no_run(module):
    body = "    print('1 \\u00b1 2')\n    return 0\nrun_program(main)"
    ended = start(module, body, subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (ended.stdout, ended.stderr, ended.returncode) == ("1 ? 2\n", "", 0)


@each
@pytest.mark.parametrize("body", ["print('a' * 100_000)", "print('a'); exit(2)"])
def test_a_reader_that_leaves_sees_no_traceback(module, body):
    """The reader leaves, as `head` does, during a print or before the last flush."""
    read, write = os.pipe()
    os.close(read)
    ended = start(module, f"    {body}\n    return 0\nrun_program(main)", write)
    os.close(write)
    assert (ended.stderr, ended.returncode) == ("", 141)


@each
def test_the_status_is_that_of_the_program(module):
    body = "    raise SystemExit(3)\nrun_program(main)"
    assert start(module, body, subprocess.PIPE).returncode == 3


@pytest.mark.parametrize("path", PROGRAMS)
def test_every_program_ends_like_that(path):
    assert path.read_text().rstrip().endswith("    run_program(main)")
