"""Checkpoints into language models."""

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ..nn import TransformerLM, get_sharding
from ..nn._transformer_options import ModelOptions, TransformerConfig
from ._config import read
from ._families import Family
from ._files import (
    DTYPES,
    Stored,
    find_config,
    find_files,
    read_headers,
    read_tensors,
    widest,
)
from ._tensors import Path, Tensor, flat_state, shapes_of, tensors_of, values_of

# Tensors of old files that follow from config.json.
FOLLOWING = ".rotary_emb.inv_freq"


def load(
    path: str | PathLike[str],
    *,
    context_length: int | None = None,
    **options: Unpack[ModelOptions],
) -> TransformerLM:
    """Read a checkpoint in the form of Hugging Face into a `TransformerLM`.

    The folder has config.json and either model.safetensors or several files with their
    model.safetensors.index.json. The families are Llama 1 to 3.2, Mistral, Qwen 2, 2.5
    and 3, OLMo 2, Gemma 2, the text models of Gemma 3, and Phi-3. The names, shapes and
    dtypes of all tensors are checked before memory is taken for any. Then the host
    has at most one layer or the embedding in memory, and each tensor goes straight to
    its place.

    Nothing is downloaded, and the tokenizer is the `tokenizers` package's.

    Args:
        path: The folder, or one .safetensors file beside a config.json.
        context_length: The length of the longest sequence; None for
            `max_position_embeddings`. A model of Phi-3 for a length that is at most its
            `original_max_position_embeddings` rotates by its list for short sequences,
            and by that for long ones otherwise. transformers takes the one or the other
            by the length of each sequence.
        options: The arguments of `TransformerLM` that are no architecture.
            `param_dtype` is by default the widest dtype of the tensors, and `dtype` is
            `param_dtype`. With a `mesh` the parameters lie as `get_sharding` says. An
            `mlp` must have the parameters of the model's own.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder, config.json or a file of weights is missing.
        ImportError: The package `safetensors` is not installed.
        ValueError: The family is unknown; config.json has an option that the language
            model does not have; a file is a pickle, truncated or no safetensors; a
            tensor is missing, unknown, of another shape or quantized; or as in
            `TransformerLM`.

    Examples:
        ```python
        import tempfile
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
            again = models.load(folder)
        print(again.config.embed_dim, again.layers.mlp.w_up.shape)
        ```
        ```text
        8 (1, 8, 12)
        ```

    References:
        The files: https://huggingface.co/docs/safetensors.
    """
    op = "load"
    file, raw = find_config(op, path)
    family, config = read(op, file, raw, context_length)
    stored = read_headers(op, find_files(op, path))
    stored = {name: x for name, x in stored.items() if not name.endswith(FOLLOWING)}
    if config.tie_embeddings:
        stored.pop("lm_head.weight", None)
    _check_dtypes(op, stored)
    if options.get("param_dtype") is None:
        options["param_dtype"] = _widest(op, stored)
    graph, state = abstract(config, options)
    targets = flat_state(state)
    shapes = shapes_of(targets)
    groups, unknown = tensors_of(family, shapes, config.num_layers)
    if unknown:
        raise ValueError(
            f"{op}: mlp must have the parameters of a {family.model_type}, got "
            f"{'.'.join(map(str, unknown[0]))} {shapes[unknown[0]]}"
        )
    _check(op, family, [tensor for group in groups for tensor in group], stored)
    places: dict[Path, Any] = dict.fromkeys(targets)
    if (mesh := options.get("mesh")) is not None:
        places = values_of(flat_state(get_sharding(state, mesh)))
    arrays = _read(groups, stored, targets, places)
    filled = [(path, targets[path].replace(array)) for path, array in arrays.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def abstract(config: TransformerConfig, options: ModelOptions) -> tuple[Any, Any]:
    """Return graph and state of a model, with shapes in place of arrays."""

    def make():
        return TransformerLM.from_config(config, **options, rngs=nnx.Rngs(0))

    return nnx.split(nnx.eval_shape(make))


def _check_dtypes(op: str, stored: Mapping[str, Stored]) -> None:
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{op}: tensors must be of {', '.join(DTYPES)}, as no quantized ones "
                f"are supported, got {tensor.dtype} of {name}"
            )


def _widest(op: str, stored: Mapping[str, Stored]) -> Any:
    """Return the dtype that holds all tensors."""
    dtype = widest(DTYPES[tensor.dtype] for tensor in stored.values())
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{op}: param_dtype must be given for tensors of F64 unless jax_enable_x64 "
            "is on, got none"
        )
    return dtype


def _check(
    op: str, family: Family, tensors: Sequence[Tensor], stored: Mapping[str, Stored]
) -> None:
    """Check the names and the shapes of all tensors."""
    wanted = {tensor.name: tensor.shape for tensor in tensors}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ValueError(
            f"{op}: a {family.model_type} with this config.json must have {missing[0]} "
            f"{wanted[missing[0]]}, got none; {len(missing)} tensors are missing"
        )
    unknown = [name for name in stored if name not in wanted]
    if unknown:
        raise ValueError(
            f"{op}: a {family.model_type} with this config.json must have no other "
            f"tensors, got {unknown[0]} {stored[unknown[0]].shape}; {len(unknown)} "
            "tensors are unknown"
        )
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{op}: {name} must have shape {shape}, got {stored[name].shape} in "
                f"{stored[name].file}"
            )


def _read(
    groups: Sequence[Sequence[Tensor]],
    stored: Mapping[str, Stored],
    targets: Mapping[Path, Any],
    places: Mapping[Path, Any],
) -> dict[Path, jax.Array]:
    """Return all parameters, with one tensor of a file in memory at a time."""
    tensors = {tensor.name: tensor for group in groups for tensor in group}
    stacked = {
        part.path: targets[part.path].get_value()
        for tensor in tensors.values()
        for part in tensor.parts
        if part.layer is not None
    }
    own = {path: places[path] for path in stacked}

    @partial(jax.jit, out_shardings=own)
    def make():
        return {path: jnp.zeros(x.shape, x.dtype) for path, x in stacked.items()}

    # Without the donation, all layers would be in memory twice.
    @partial(jax.jit, donate_argnums=0, out_shardings=own)
    def put(stack, layer, index):
        def one(all_layers, value):
            return lax.dynamic_update_index_in_dim(all_layers, value, index, 0)

        return jax.tree.map(one, stack, layer)

    arrays, stack = {}, make()
    for group in groups:
        layer, index = {}, None
        for name, tensor in read_tensors(stored, [tensor.name for tensor in group]):
            for part, value in tensors[name].split(tensor):
                dtype = targets[part.path].get_value().dtype
                place = places[part.path]
                if part.layer is not None and place is not None:
                    place = NamedSharding(place.mesh, P(*place.spec[1:]))
                array = _place(value.astype(dtype, copy=False), place)
                (arrays if part.layer is None else layer)[part.path] = array
                index = part.layer
        if index is not None:
            stack = put(stack, layer, np.int32(index))
        # Without this, the tensors of many layers would wait in memory.
        jax.block_until_ready((stack, arrays))
    return arrays | stack


def _place(value: np.ndarray, place: NamedSharding | None) -> jax.Array:
    """Put an array on its devices, of which this process has some."""
    if place is None:
        return jax.device_put(value)
    return jax.make_array_from_callback(value.shape, place, lambda index: value[index])
