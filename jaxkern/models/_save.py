"""Language models into checkpoints."""

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path as File
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax

from .._core.checks import kind_of
from ..nn import MLP, SwiGLU, TransformerConfig, TransformerLM
from ._config import differences, read, read_options, write_options
from ._families import FAMILIES, Family
from ._files import INDEX, ONE, find_config, safetensors, widest
from ._load import abstract
from ._tensors import Path, Tensor, flat_state, shapes_of, tensors_of, values_of

# Bytes of a file, which are in the memory of the host while it is written.
FILE_BYTES = 2 * 2**30
# Without these keys, transformers would take the tokens of another model.
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def save(
    model: TransformerLM,
    folder: str | PathLike[str],
    *,
    like: str | PathLike[str] | None = None,
) -> None:
    """Write a model as a folder of Hugging Face, which transformers and `load` read.

    The folder gets config.json and the parameters in their own dtype: in
    model.safetensors, or in several files with an index above 2 GiB. What is no
    parameter and no architecture is not saved: `attention_fn`, `dtype`, `mesh`, `remat`
    and `scan_layers`. The tokenizer is the `tokenizers` package's.

    Args:
        model: The model. Its architecture must be one that a family of `load` has; the
            published weights of all have `rope_pairs="halves"`.
        folder: The folder, which is made. It must not have a model yet.
        like: A folder of Hugging Face whose config.json is taken, with its
            `model_type`, tokens and all other keys; None for a new one of the first
            family that has the architecture. It must say the model's architecture.

    Raises:
        FileExistsError: The folder has a model.
        FileNotFoundError: `like` has no config.json.
        ImportError: The package `safetensors` is not installed.
        TypeError: `model` is not a `TransformerLM`.
        ValueError: No family has the architecture or the parameters, `like` says
            another architecture, or parameters are on devices of other processes.

    Examples:
        ```python
        import os, tempfile
        from flax import nnx
        from jaxkern import models, nn

        model = nn.TransformerLM(
            16,
            8,
            embed_dim=8,
            num_layers=1,
            num_heads=2,
            hidden_dim=12,
            rope_pairs="halves",
            rngs=nnx.Rngs(0),
        )
        with tempfile.TemporaryDirectory() as folder:
            models.save(model, folder)
            print(sorted(os.listdir(folder)))
        ```
        ```text
        ['config.json', 'model.safetensors']
        ```

    References:
        The files: https://huggingface.co/docs/safetensors.
    """
    op = "save"
    if not isinstance(model, TransformerLM):
        raise TypeError(f"{op}: model must be a TransformerLM, got {kind_of(model)}")
    folder = File(fspath(folder))
    package = safetensors(op)
    _check_folder(op, folder)
    variables = flat_state(nnx.state(model, nnx.Param))
    arrays = values_of(variables)
    _check_parameters(op, model, shapes_of(variables))
    for path, array in arrays.items():
        if not array.is_fully_addressable:
            raise ValueError(
                f"{op}: parameters must be on devices of this process, got "
                f"{'.'.join(map(str, path))} {array.shape} on others"
            )
    family, raw = _choose(op, model.config, like)
    raw["torch_dtype"] = widest(array.dtype for array in arrays.values()).name
    groups, _ = tensors_of(family, shapes_of(variables), model.config.num_layers)
    folder.mkdir(parents=True, exist_ok=True)
    _write(package, folder, groups, arrays)
    _write_json(folder / "config.json", raw)


def _check_folder(op: str, folder: File) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{op}: folder must be a folder, got the file {folder}")
    for name in ("config.json", ONE, INDEX):
        if (folder / name).exists():
            raise FileExistsError(
                f"{op}: folder must have no model, got {folder} with {name}"
            )


def _check_parameters(
    op: str, model: TransformerLM, shapes: Mapping[Path, tuple[int, ...]]
) -> None:
    """Check that the model is what its config says."""
    options: Any = {"scan_layers": model.scan_layers}
    _, state = abstract(model.config, options)
    wanted = shapes_of(flat_state(state))
    if shapes != wanted:
        path = min(shapes.items() ^ wanted.items(), key=str)[0]
        got = f"{'.'.join(map(str, path))} {shapes.get(path, 'missing')}"
        raise ValueError(
            f"{op}: the parameters must be those of the model's config, as Hugging "
            f"Face's form has no others, got {got}; save_native keeps compressed models"
        )
    layers = model.layers if isinstance(model.layers, nnx.List) else [model.layers]
    for layer in layers:
        mlp = layer.mlp
        activation = mlp.activation if type(mlp) is MLP else "silu"
        if type(mlp) not in (MLP, SwiGLU) or activation != model.config.activation:
            raise ValueError(
                f"{op}: mlp must be the one of the model's config, got "
                f"{kind_of(mlp)} with another; save_native keeps MLPs of jaxkern.nn"
            )


def _choose(
    op: str, config: TransformerConfig, like: str | PathLike[str] | None
) -> tuple[Family, dict[str, Any]]:
    """Return the family, and what config.json has."""
    if like is not None:
        file, raw = find_config(op, like)
        family, said = read(op, file, raw, config.context_length)
        if lost := differences(config, said):
            raise ValueError(
                f"{op}: like must say the model's architecture, got {file} without "
                f"{_list(lost)}"
            )
        raw.pop("dtype", None)
        return family, raw
    reasons = []
    for family in FAMILIES:
        raw = write_options(family, config)
        try:
            lost = differences(config, read_options(family, raw))
        except ValueError as error:
            reasons.append((1, family.model_type, str(error)))
            continue
        if not lost:
            return family, raw | NO_TOKENS
        reasons.append((len(lost), family.model_type, f"it has no {_list(lost)}"))
    names = ", ".join(family.model_type for family in FAMILIES)
    _, nearest, reason = min(reasons, key=lambda each: each[0])
    raise ValueError(
        f"{op}: the architecture must be one of {names}; the nearest is {nearest}, but "
        f"{reason}"
    )


def _list(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _write(
    package: Any,
    folder: File,
    groups: Sequence[Sequence[Tensor]],
    arrays: Mapping[Path, jax.Array],
) -> None:
    """Write the tensors, in files of at most about `FILE_BYTES`."""
    files: list[list[Tensor]] = []
    left = 0
    for tensor in (tensor for group in groups for tensor in group):
        itemsize = arrays[tensor.parts[0].path].dtype.itemsize
        size = math.prod(tensor.shape) * itemsize
        if not files or size > left:
            files.append([])
            left = FILE_BYTES
        files[-1].append(tensor)
        left -= size
    index, count = {}, len(files)
    for i, tensors in enumerate(files, start=1):
        name = ONE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
        content = {tensor.name: _join(tensor, arrays) for tensor in tensors}
        # transformers reads only files that say so.
        package.numpy.save_file(content, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(content, name)
    if count > 1:
        total = sum(array.nbytes for array in arrays.values())
        content = {"metadata": {"total_size": total}, "weight_map": index}
        _write_json(folder / INDEX, content)


def _write_json(file: File, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _join(tensor: Tensor, arrays: Mapping[Path, jax.Array]) -> np.ndarray:
    """Return a tensor in the memory of the host."""
    values = {}
    for path, layer, _ in tensor.parts:
        array = arrays[path] if layer is None else _layer_of(arrays[path], layer)
        values[path] = np.asarray(array)
    return tensor.join(values)


@jax.jit
def _layer_of(stacked, index):
    return lax.dynamic_index_in_dim(stacked, index, keepdims=False)
