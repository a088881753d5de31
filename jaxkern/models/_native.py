"""Language models in a form of our own, which compressed ones have too."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh

from .._attention.rotary_scaling import RotaryScaling
from .._core.checks import check_dtype, kind_of
from .._sparsity.packed import Packed24
from ..nn import (
    MLP,
    CompressedMLP,
    LowRankLinear,
    LowRankReLU2,
    LowRankSwiGLU,
    Packed24Linear,
    SwiGLU,
    TransformerConfig,
    TransformerLM,
    get_sharding,
)
from ..nn._common import axis_metadata
from ..nn._layers import layers_in_list
from ._files import (
    ONE,
    find_config,
    find_files,
    read_headers,
    read_tensors,
    safetensors,
)
from ._tensors import flat_state, values_of

MODEL_TYPE = "jaxkern"
# The attributes that are the arguments of the constructor of each class.
SIZES = ("embed_dim", "hidden_dim")
LINEAR = ("in_features", "out_features")
ARGUMENTS = {
    SwiGLU: SIZES,
    LowRankSwiGLU: (*SIZES, "rank"),
    LowRankReLU2: (*SIZES, "rank", "sparsity", "gradient"),
    nnx.Linear: LINEAR,
    LowRankLinear: (*LINEAR, "rank"),
    Packed24Linear: LINEAR,
}
CHAINS = "gate", "up", "down"
MLPS = SwiGLU, MLP, LowRankSwiGLU, LowRankReLU2, CompressedMLP
LINEARS = nnx.Linear, LowRankLinear, Packed24Linear


def save_native(model: TransformerLM, folder: str | PathLike[str]) -> None:
    """Write a language model, compressed or not, in a form of our own.

    The folder gets config.json, which has the architecture and, for each layer, the
    class of its MLP and its sizes, and model.safetensors with the parameters in their
    own dtype, one layer after another. `load_native` reads it. `mesh`, `remat` and
    `scan_layers` are not saved.

    Args:
        model: The model. Its MLPs are `SwiGLU`, `MLP`, `LowRankSwiGLU`, `LowRankReLU2`
            or `CompressedMLP`.
        folder: The folder, which is made. It must not have a model yet.

    Raises:
        FileExistsError: The folder has a model.
        ImportError: The package `safetensors` is not installed.
        TypeError: `model` is not a `TransformerLM`, or has an MLP of another class.
        ValueError: The model has an `attention_fn` of its own, which is no data.

    Examples:
        ```python
        import tempfile
        from flax import nnx
        from jaxkern import models, nn
        from jaxkern.compress import compress

        sizes = {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 32}
        model = nn.TransformerLM(16, 8, **sizes, rngs=nnx.Rngs(0))
        small, report = compress(model, method="svd", rank=4)
        with tempfile.TemporaryDirectory() as folder:
            models.save_native(small, folder)
            print(type(models.load_native(folder).layers[0].mlp).__name__)
        ```
        ```text
        LowRankSwiGLU
        ```

    References:
        The files: https://huggingface.co/docs/safetensors.
    """
    op = "save_native"
    if not isinstance(model, TransformerLM):
        raise TypeError(f"{op}: model must be a TransformerLM, got {kind_of(model)}")
    if model.attention_fn is not None:
        raise ValueError(
            f"{op}: attention_fn must be None, since a function is no data, got one"
        )
    package, folder = safetensors(op), File(folder)
    for name in ("config.json", ONE):
        if (folder / name).exists():
            raise FileExistsError(
                f"{op}: folder must have no model, got {folder} with {name}"
            )
    view = nnx.clone(model)
    view.layers = layers_in_list(model.layers, model.config.num_layers)
    content = {
        "model_type": MODEL_TYPE,
        "dtype": jnp.dtype(model.dtype).name,
        "architecture": asdict(model.config),
        "mlps": [_describe(op, i, layer.mlp) for i, layer in enumerate(view.layers)],
    }
    arrays = values_of(flat_state(nnx.state(view)))
    tensors = {_name(path): np.asarray(array) for path, array in arrays.items()}
    folder.mkdir(parents=True, exist_ok=True)
    package.numpy.save_file(tensors, folder / ONE)
    text = json.dumps(content, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def load_native(
    folder: str | PathLike[str], *, dtype: Dtype | None = None, mesh: Mesh | None = None
) -> TransformerLM:
    """Read a language model that `save_native` wrote.

    The names and shapes of all tensors are checked before memory is taken for any, and
    each goes straight to its place. The layers of the model are in a list.

    Args:
        folder: The folder.
        dtype: The dtype of the computation and of the parameters; None for those of the
            model that was saved.
        mesh: As in `TransformerLM`; the parameters lie as `get_sharding` says.

    Returns:
        The model.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ImportError: The package `safetensors` is not installed.
        TypeError: `dtype` is not a floating-point dtype.
        ValueError: config.json is of another kind of model, or not what `save_native`
            writes; or a tensor is missing, unknown or of another shape.

    Examples:
        ```python
        import tempfile
        import jax.numpy as jnp
        from flax import nnx
        from jaxkern import models, nn

        sizes = {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 32}
        model = nn.TransformerLM(16, 8, **sizes, rngs=nnx.Rngs(0))
        with tempfile.TemporaryDirectory() as folder:
            models.save_native(model, folder)
            small = models.load_native(folder, dtype=jnp.bfloat16)
        print(small.config == model.config, small.embedding.dtype)
        ```
        ```text
        True bfloat16
        ```

    References:
        The files: https://huggingface.co/docs/safetensors.
    """
    op = "load_native"
    if dtype is not None:
        check_dtype(op, "dtype", dtype)
    file, content = find_config(op, folder)
    if content.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{op}: model_type in {file} must be {MODEL_TYPE!r}, got "
            f"{content.get('model_type')!r}; models.load reads those of Hugging Face"
        )
    stored = read_headers(op, find_files(op, folder))
    try:
        graph, state = nnx.split(nnx.eval_shape(lambda: _build(content, dtype, mesh)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{op}: {file} must be as save_native writes it, got {error!r}"
        ) from error
    variables = {_name(path): (path, x) for path, x in flat_state(state).items()}
    shapes = {name: x.get_value().shape for name, (_, x) in variables.items()}
    for name in shapes | stored:
        wanted = shapes.get(name, "none")
        got = stored[name].shape if name in stored else "none"
        if got != wanted:
            raise ValueError(
                f"{op}: the shape of {name} in {folder} must be {wanted}, got {got}"
            )
    places: dict[Any, Any] = {}
    if mesh is not None:
        places = values_of(flat_state(get_sharding(state, mesh)))
    filled = []
    for name, value in read_tensors(stored, list(stored)):
        path, variable = variables[name]
        if dtype is not None and jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(dtype)
        array = jax.device_put(value, places.get(path))
        filled.append((path, variable.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _describe(op: str, i: int, mlp: object) -> dict[str, Any]:
    """Return the class of an MLP and the arguments that make one like it."""
    kind = type(mlp)
    if kind not in MLPS:
        raise TypeError(
            f"{op}: the mlp of layer {i} must be one of "
            f"{', '.join(known.__name__ for known in MLPS)}, got {kind.__name__}"
        )
    if isinstance(mlp, MLP):
        options = {
            "embed_dim": mlp.embed_dim,
            "hidden_dim": mlp.w_up.shape[1],
            "gated": mlp.w_gate is not None,
            "activation": mlp.activation,
            "use_bias": mlp.b_up is not None,
        }
    elif isinstance(mlp, CompressedMLP):
        options = {
            "activation": mlp.activation,
            "sparsity": mlp.sparsity,
            "biases": {name: len(bias[...]) for name, bias in mlp.biases.items()},
        }
        for name in CHAINS:
            options[name] = [_arguments(layer) for layer in getattr(mlp, name)]
    else:
        return _arguments(mlp)
    return {"class": kind.__name__, **options}


def _arguments(module: Any) -> dict[str, Any]:
    names = ARGUMENTS[type(module)]
    options = {name: getattr(module, name) for name in names}
    return {"class": type(module).__name__, **options}


def _build(
    content: Mapping[str, Any], dtype: Dtype | None, mesh: Mesh | None
) -> TransformerLM:
    """Return a model of the described kind, whose arrays are of no use."""
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(dtype or content["dtype"])}
    architecture = dict(content["architecture"])
    if (scaling := architecture["rope_scaling"]) is not None:
        architecture["rope_scaling"] = RotaryScaling(**_tuples(scaling))
    config = TransformerConfig(**architecture)
    rngs = nnx.Rngs(0)
    model = TransformerLM.from_config(
        config, **dtypes, scan_layers=False, mesh=mesh, rngs=rngs
    )
    if len(content["mlps"]) != config.num_layers:
        raise ValueError(f"{len(content['mlps'])} mlps of {config.num_layers} layers")
    for layer, options in zip(model.layers, content["mlps"], strict=True):
        layer.mlp = _build_mlp(options, {**dtypes, "rngs": rngs})
    return model


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists in the place of tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _build_mlp(options: Mapping[str, Any], common: dict[str, Any]) -> nnx.Module:
    options = _tuples(options)
    kind = {known.__name__: known for known in MLPS}[options.pop("class")]
    if kind is not CompressedMLP:
        return kind(**options, **common)
    for name in CHAINS:
        axes = ("mlp", "embed") if name == "down" else ("embed", "mlp")
        chain = options[name]
        options[name] = [_build_linear(one, axes, common) for one in chain]
    sizes = options.pop("biases").items()
    biases = {name: jnp.zeros(size) for name, size in sizes}
    return CompressedMLP(**options, biases=biases, dtype=common["dtype"])


def _build_linear(
    options: Mapping[str, Any], axes: tuple[str, str], common: dict[str, Any]
) -> nnx.Module:
    options = dict(options)
    kind = {known.__name__: known for known in LINEARS}[options.pop("class")]
    if kind is Packed24Linear:
        d_in, d_out = options["in_features"], options["out_features"]
        groups = -(-d_in // 4)
        indices = jnp.zeros((d_out, -(-groups // 2)), jnp.uint8)
        weight = Packed24(jnp.zeros((d_out, 2 * groups)), indices, d_in)
        return Packed24Linear(weight, dtype=common["dtype"])
    if kind is LowRankLinear:
        names = axes[0], "rank", axes[1]
        return LowRankLinear(**options, **common, axis_names=names)
    metadata = axis_metadata(*axes)
    return nnx.Linear(**options, **common, use_bias=False, kernel_metadata=metadata)
