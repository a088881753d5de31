"""The public names, what `import jaxkern` loads, and how it is installed."""

import os
import pydoc
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import jaxkern


@pytest.mark.parametrize(
    "module", [jaxkern, jaxkern.models, jaxkern.nn], ids=lambda m: m.__name__
)
def test_all_is_every_public_name(module):
    public = {
        name
        for name, value in vars(module).items()
        if name[0] != "_"
        and (name in ("models", "nn") or not isinstance(value, ModuleType))
    }
    assert sorted(public) == module.__all__
    shown = pydoc.plain(pydoc.render_doc(module))
    assert [name for name in module.__all__ if name not in shown] == []


def test_mosaic_is_imported_on_first_use_of_a_kernel():
    code = "import sys, jaxkern; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = run.stdout.split()
    assert "jaxkern.nn" in loaded
    # JAX itself loads parts of Mosaic, but neither this one nor our kernels.
    assert "jax.experimental.pallas.mosaic_gpu" not in loaded
    ours = [name for name in loaded if name.startswith("jaxkern.")]
    assert [name for name in ours if "hopper" in name or "_mosaic" in name] == []


def test_the_abandoned_distribution_in_our_folder_is_an_error(tmp_path):
    """Its `__init__.py` may have replaced ours, and our other modules still notice."""
    package = tmp_path / "jaxkern"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_core").symlink_to(Path("jaxkern/_core").absolute())
    (tmp_path / "jaxkern_fused-0.1.0.dist-info").mkdir()

    def error_of_import():
        # Without site-packages, where this test's own jaxkern is installed.
        command = [sys.executable, "-S", "-c", "import jaxkern._core"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return run.stderr

    assert error_of_import() == ""
    for name in ("jaxkern-0.0.5.dist-info", "jaxkern-0.0.5-py3.12.egg-info"):
        (tmp_path / name).mkdir()
        last = error_of_import().splitlines()[-1]
        assert last.startswith("ImportError: jaxkern: jaxkern-fused must not share")
        assert f"got {name} in {tmp_path}" in last
        assert "pip uninstall --yes jaxkern jaxkern-fused" in last
        (tmp_path / name).rmdir()


def test_make_leaves_an_environment_that_it_did_not_make(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(name, tmp_path)
    precious = tmp_path / ".venv" / "precious"
    precious.parent.mkdir()
    precious.write_text("mine")
    # Without this, a make that runs this test would pass on its own variables.
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "VENV")
    unset = inherited + ("CONSTRAINTS", "ARGS", "CASES")
    run = subprocess.run(
        ["make", f"PYTHON={sys.executable}", "test"],
        cwd=tmp_path,
        env={name: x for name, x in os.environ.items() if name not in unset},
        capture_output=True,
        text=True,
    )
    assert run.returncode and ".venv exists, and make did not make it." in run.stderr
    assert precious.read_text() == "mine"
