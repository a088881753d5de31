"""config.json of Hugging Face, and the architecture that it says."""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from ..nn import TransformerConfig
from ..nn._transformer_options import NUMBERS
from ._families import DEFAULTS, FAMILIES, REFUSED, Family
from ._files import find_config
from ._rotary import flatten, read_scaling, write_scaling

ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
# Other names of transformers for the same functions.
SYNONYMS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
FULL, LOCAL = "full_attention", "sliding_attention"


def read_config(
    path: str | PathLike[str], *, context_length: int | None = None
) -> TransformerConfig:
    """Read the architecture of a folder of Hugging Face, without its weights.

    Args:
        path: The folder, or a file in it.
        context_length: As in `load`.

    Returns:
        The architecture, as `load` gives it to its model.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: config.json is of an unknown family, or has an option that the
            language model does not have; the message names both.

    Examples:
        ```python
        import json, tempfile
        from pathlib import Path
        from jaxkern import models

        sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12}
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        config = {"model_type": "olmo2", "max_position_embeddings": 32, **sizes}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            config = models.read_config(folder, context_length=16)
        print(config.qk_norm, config.context_length)
        ```
        ```text
        embed 16
        ```

    References:
        The keys: https://huggingface.co/docs/transformers/main_classes/configuration.
    """
    file, raw = find_config("read_config", path)
    return read("read_config", file, raw, context_length)[1]


def read(
    op: str, file: Any, raw: Mapping[str, Any], context_length: int | None
) -> tuple[Family, TransformerConfig]:
    """Return the family and the architecture of a config.json."""
    try:
        family = find_family(raw)
        return family, read_options(family, raw, context_length)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{op}: {error}; the file is {file}") from error


def find_family(raw: Mapping[str, Any]) -> Family:
    """Return the family of a config.json."""
    model_type = raw.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    names = ", ".join(family.model_type for family in FAMILIES)
    reason = (
        f", which is refused: {REFUSED[model_type]}" if model_type in REFUSED else ""
    )
    raise ValueError(
        f"model_type must be one of {names} in config.json, got {model_type!r}{reason}"
    )


def read_options(
    family: Family, raw: Mapping[str, Any], context_length: int | None = None
) -> TransformerConfig:
    """Return the architecture that a config.json of this family says."""
    defaults = DEFAULTS | dict(family.defaults)
    given = defaults | flatten(raw)
    for key, values in family.only.items():
        if given.get(key) not in values:
            raise ValueError(
                f"{key} must be {values[-1]} in config.json, got {given[key]!r}"
            )
    if context_length is not None:
        given.setdefault("max_position_embeddings", context_length)
    for key in family.options.values():
        if key not in defaults and given.get(key) is None:
            raise ValueError(f"config.json must have {key}, got none")
    options = {ours: given[key] for ours, key in family.options.items()}
    if context_length is not None:
        options["context_length"] = context_length
    if "attention_scale" in options:
        options["attention_scale"] **= -0.5
    if family.scaled_embedding:
        options["embedding_scale"] = options["embed_dim"] ** 0.5
    options["activation"] = _read_activation(family, given)
    options["rope_scaling"] = read_scaling(given, options["context_length"])
    options |= _read_windows(family, given)
    local = options.get("local_rope_theta")
    if local is not None and "full_attention_every" not in options:
        # All layers are of one kind, which has its own frequencies.
        del options["local_rope_theta"]
        if "window" in options:
            options |= {"rope_theta": local, "rope_scaling": None}
    for name, value in options.items():
        if name in NUMBERS and type(value) is int:
            options[name] = float(value)
    options |= {"rope_pairs": "halves", **family.always}
    return TransformerConfig(**options, rotary_dim=_read_rotary_dim(family, given))


def _read_activation(family: Family, given: Mapping[str, Any]) -> str:
    name = given[family.activation]
    name = SYNONYMS.get(name, name)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{family.activation} must be one of {', '.join(ACTIVATIONS)} in "
            f"config.json, got {name!r}"
        )
    return ACTIVATIONS[name]


def _read_rotary_dim(family: Family, given: Mapping[str, Any]) -> int | None:
    share = given["partial_rotary_factor"]
    if share == 1:
        return None
    if not family.partial_rotary:
        raise ValueError(
            f"partial_rotary_factor must be 1 for {family.model_type} in config.json, "
            f"got {share}"
        )
    dim = given["head_dim"] or given["hidden_size"] // given["num_attention_heads"]
    return int(dim * share)


def _read_windows(family: Family, given: Mapping[str, Any]) -> dict[str, int]:
    """Return `window` and `full_attention_every`, where there are any."""
    window, count = given["sliding_window"], given["num_hidden_layers"]
    if family.windows == "last" and not given["use_sliding_window"]:
        window = None
    if family.windows == "none" or window is None:
        return {}
    if family.windows == "all":
        return {"window": window}
    if (kinds := given.get("layer_types")) is not None:
        if len(kinds) != count or not {*kinds} <= {FULL, LOCAL}:
            raise ValueError(
                f"layer_types must be {count} of {FULL} and {LOCAL} in config.json, "
                f"got {kinds}"
            )
        full = [kind == FULL for kind in kinds]
    elif family.windows == "last":
        full = [i < given["max_window_layers"] for i in range(count)]
    else:
        every = given["sliding_window_pattern"]
        full = [(i + 1) % every == 0 for i in range(count)]
    if all(full):
        return {}
    if not any(full):
        return {"window": window}
    every = full.index(True) + 1
    if full != [(i + 1) % every == 0 for i in range(count)]:
        where = [i for i, is_full in enumerate(full) if is_full]
        raise ValueError(
            "the layers without a window must be none, all or each n-th in "
            f"config.json, got {where} of {count}"
        )
    return {"window": window, "full_attention_every": every}


def write_options(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """Return the config.json of this family that is nearest to the architecture.

    It may say another architecture, where the family lacks an option.
    """
    config = resolve(config)
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    raw |= {key: getattr(config, ours) for ours, key in family.options.items()}
    if "query_pre_attn_scalar" in raw:
        raw["query_pre_attn_scalar"] = round(raw["query_pre_attn_scalar"] ** -2)
    if "rope_local_base_freq" in raw and raw["rope_local_base_freq"] is None:
        raw["rope_local_base_freq"] = config.rope_theta
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    raw[family.activation] = names.get(config.activation, config.activation)
    if family.partial_rotary:
        dim = config.rotary_dim or config.heads[-1]
        raw["partial_rotary_factor"] = dim / config.heads[-1]
    raw |= write_scaling(config.rope_scaling, config.context_length)
    if family.windows != "none":
        raw["sliding_window"] = config.window
    if family.windows in ("last", "most"):
        every, count = config.full_attention_every, config.num_layers
        full = [
            config.window is None or (every is not None and (i + 1) % every == 0)
            for i in range(count)
        ]
        raw["layer_types"] = [FULL if is_full else LOCAL for is_full in full]
    if family.windows == "last":
        raw["use_sliding_window"] = config.window is not None
        raw["max_window_layers"] = config.num_layers
    return raw


def resolve(config: TransformerConfig) -> TransformerConfig:
    """Return an equal architecture, in which no number is None that follows."""
    _, kv_heads, dim = config.heads
    options: dict[str, Any] = {"num_kv_heads": kv_heads, "head_dim": dim}
    if config.attention_scale is None:
        options["attention_scale"] = dim**-0.5
    if config.rotary_dim == dim:
        options["rotary_dim"] = None
    if config.local_rope_theta is None and config.full_attention_every is not None:
        if config.rope_scaling is None:
            options["local_rope_theta"] = config.rope_theta
    return replace(config, **options)


def differences(one: TransformerConfig, other: TransformerConfig) -> dict[str, Any]:
    """Return the options of `one` that are not those of `other`."""
    one, other = resolve(one), resolve(other)
    return {
        name: value
        for name, value in vars(one).items()
        if value != getattr(other, name)
    }
