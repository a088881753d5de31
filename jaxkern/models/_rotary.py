"""The rotary positions of config.json, in both forms that transformers writes."""

from collections.abc import Mapping
from typing import Any

from .._attention.rotary_scaling import RotaryScaling

# The attributes of a `RotaryScaling`, each with its key; "longrope" has two lists more.
LENGTH = {"original_context_length": "original_max_position_embeddings"}
SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": LENGTH
    | {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": LENGTH
    | {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    },
    "longrope": LENGTH | {"factor": "factor", "attention_factor": "attention_factor"},
}
LISTS = "long_factor", "short_factor"
KINDS = "full_attention", "sliding_attention"


def flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Bring `rope_parameters` of transformers 5 into the form of transformers 4.

    Returns:
        config.json without `rope_parameters`, and with `rope_scaling` None where the
        frequencies are not scaled.

    Raises:
        ValueError: The layers with a window have scaled frequencies.
    """
    raw = dict(raw)
    rope = raw.pop("rope_parameters", None) or {}
    if not rope.keys().isdisjoint(KINDS):
        # The form of Gemma 3, with a dictionary for each kind of layer.
        full, local = (dict(rope.get(kind) or {}) for kind in KINDS)
        if (kind := _pop_kind(local)) != "default":
            raise ValueError(
                "rope_type of sliding_attention must be 'default' in config.json, got "
                f"{kind!r}"
            )
        if "rope_theta" in local:
            raw["rope_local_base_freq"] = local["rope_theta"]
        rope = full
    scaling = dict(raw.get("rope_scaling") or rope)
    for key in ("rope_theta", "partial_rotary_factor"):
        if (value := scaling.pop(key, None)) is not None:
            raw[key] = value
    kind = _pop_kind(scaling)
    raw["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **scaling}
    return raw


def _pop_kind(rope: dict[str, Any]) -> str:
    old, new = rope.pop("type", None), rope.pop("rope_type", None)
    kind = new or old or "default"
    # The name of "longrope" in the first models that had it.
    return "longrope" if kind == "su" else kind


def read_scaling(given: Mapping[str, Any], context_length: int) -> RotaryScaling | None:
    """Return the scaling of a flat config.json.

    Args:
        given: The keys of config.json.
        context_length: The length for which the model is made. Up to the original
            length, "longrope" takes its list for short sequences.

    Raises:
        ValueError: The scaling is unknown, or has an unknown or lacks a known key.
    """
    if given["rope_scaling"] is None:
        return None
    scaling: dict[str, Any] = {
        k: x for k, x in given["rope_scaling"].items() if x is not None
    }
    kind = scaling.pop("rope_type")
    if kind not in SCALINGS:
        raise ValueError(
            f"rope_type must be one of default, {', '.join(SCALINGS)} in config.json, "
            f"got {kind!r}"
        )
    known = SCALINGS[kind] | ({x: x for x in LISTS} if kind == "longrope" else {})
    for key in scaling:
        if key not in known.values():
            raise ValueError(
                f"rope_scaling of {kind!r} must have the keys "
                f"{', '.join(known.values())} in config.json, got {key!r}"
            )
    most: Any = given["max_position_embeddings"]
    if kind != "linear":
        # The key outside of the dictionary goes first, as in transformers.
        key = LENGTH["original_context_length"]
        length: Any = given.get(key) or scaling.get(key) or most
        scaling[key] = length
        if kind in ("yarn", "longrope"):
            scaling.setdefault("factor", most / length)
    needed = LISTS if kind == "longrope" else ()
    for key in ("factor", *needed):
        if key not in scaling:
            raise ValueError(f"rope_scaling must have {key} in config.json, got none")
    options = {
        ours: scaling[key] for ours, key in SCALINGS[kind].items() if key in scaling
    }
    for name, value in options.items():
        if name not in (*LENGTH, "truncate"):
            options[name] = float(value)
    if kind == "longrope":
        is_long = context_length > options["original_context_length"]
        factors = scaling["long_factor" if is_long else "short_factor"]
        options["factors"] = tuple(map(float, factors))
    return RotaryScaling(kind, **options)


def write_scaling(scaling: RotaryScaling | None, most: int) -> dict[str, Any]:
    """Return the keys of config.json for a scaling.

    Both lists of "longrope" are the one that the model has.

    Args:
        scaling: The scaling, or None.
        most: The value of `max_position_embeddings`.
    """
    if scaling is None:
        return {"rope_scaling": None}
    kind = scaling.kind
    given: dict[str, Any] = {"rope_type": kind}
    for ours, key in SCALINGS[kind].items():
        if (value := getattr(scaling, ours)) is not None:
            given[key] = value
    if kind != "longrope":
        return {"rope_scaling": given}
    key = LENGTH["original_context_length"]
    length = given.pop(key)
    if most / length == scaling.factor:
        # transformers 4 takes no more keys than the lists.
        del given["factor"]
    given |= {name: list(scaling.factors) for name in LISTS}
    return {"rope_scaling": given, key: length}
