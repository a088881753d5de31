"""The files of a checkpoint: config.json, safetensors, and the index of several."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ".bin", ".pt", ".pth", ".pkl", ".ckpt"
# The dtypes that are no quantization.
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Stored(NamedTuple):
    """A tensor of a file, by its header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def safetensors(op: str) -> Any:
    """Return the package, which only `load` and `save` need."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"{op}: the package safetensors must be installed: "
            'pip install "jaxkern-fused[models]"'
        ) from error
    return safetensors


def widest(dtypes: Iterable[Any]) -> Any:
    """Return the dtype that holds the numbers of all."""
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.promote_types, {jnp.dtype(dtype) for dtype in dtypes})


def find_config(op: str, path: str | PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Return config.json of a folder, or beside a file, and what is in it."""
    path = Path(path)
    if not path.exists():
        name = f"{path}" if len(path.parts) == 2 else "OWNER/NAME"
        raise FileNotFoundError(
            f"{op}: the folder must exist, got {path}. Nothing is downloaded here: "
            f"hf download {name} --local-dir {path}"
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"{op}: the file must be .safetensors{_reason(path)}")
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{op}: config.json must be in {file.parent}, got none")
    return file, read_json(op, file)


def read_json(op: str, file: Path) -> dict[str, Any]:
    """Return the dictionary of a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{op}: {file} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{op}: {file} must have a dictionary, got a {kind}")
    return content


def _reason(path: Path) -> str:
    if path.suffix not in PICKLES:
        return f", got {path}"
    return (
        f", got {path}, a pickle, which can run any code when it is read; transformers "
        "converts it: from_pretrained, then save_pretrained"
    )


def find_files(op: str, path: str | PathLike[str]) -> list[Path]:
    """Return the safetensors files of a checkpoint."""
    path = Path(path)
    if path.is_file():
        return [path]
    if (path / ONE).exists():
        return [path / ONE]
    if (path / INDEX).exists():
        index = read_json(op, path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{op}: {path / INDEX} must have a weight_map, got none")
        files = [path / name for name in sorted({*index.values()})]
        for file in files:
            if not file.exists():
                raise FileNotFoundError(f"{op}: {file} must exist, as {INDEX} says")
        return files
    others = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    reason = _reason(others[0]) if others else f", got none in {path}"
    raise FileNotFoundError(f"{op}: there must be {ONE} or {INDEX}{reason}")


def read_headers(op: str, files: list[Path]) -> dict[str, Stored]:
    """Return the tensors of the files by their headers."""
    package, found = safetensors(op), {}
    for file in files:
        try:
            opened = package.safe_open(file, framework="np")
        except package.SafetensorError as error:
            raise ValueError(
                f"{op}: {file} must be a whole safetensors file, got {error}"
            ) from error
        with opened:
            for name in sorted(opened.keys()):
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                found[name] = Stored(file, shape, part.get_dtype())
    if not found:
        raise ValueError(f"{op}: the files must have tensors, got none in {files[0]}")
    return found


def read_tensors(
    stored: Mapping[str, Stored], names: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tensors one by one, each with its name."""
    package = safetensors("load")
    for file in dict.fromkeys(stored[name].file for name in names):
        # Without "pread", the pages of the file would be memory of the process.
        with package.safe_open(file, framework="np", backend="pread") as opened:
            for name in names:
                if stored[name].file == file:
                    yield name, opened.get_tensor(name)
