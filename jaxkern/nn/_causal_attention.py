"""The attention of a language model: within a sequence, and to a cache."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .._attention.decoder import decoder_attention, same_document
from ._common import bind, check_callable, takes_return_lse
from ._sharding import attend_on_mesh


class CausalAttention(NamedTuple):
    """The functions that attend, and what they cannot do.

    Attributes:
        within: Called as `within(query, key, value, **options)`, for a whole sequence.
            `segment_ids` is one of its options.
        to_cache: Called as `to_cache(query, keys, values, seen=, positions=,
            **options)`, for the newest tokens of a sequence. `seen` (batch or 1, 1,
            seq, capacity) says which of the cached keys a query sees, and `positions`
            (batch or 1, seq) where the queries are in the cache.
        why_no_cache: Why there is no such function, or None.
        why_no_documents: Why there is no option `segment_ids`, or None.
        any_length: Whether a cache may be longer than the sequence.
    """

    within: Callable[..., Any]
    to_cache: Callable[..., Any]
    why_no_cache: str | None
    why_no_documents: str | None
    any_length: bool


def choose_attention(
    attention_fn: Any, mesh: Mesh | None, options: dict[str, Any], has_sinks: bool
) -> CausalAttention:
    """Return the given attention or ours, causal, and on the mesh if any.

    Args:
        attention_fn: As in `TransformerLM`.
        mesh: The mesh.
        options: The scale and the softcap, where they are given.
        has_sinks: Whether the log-sum-exp is needed.
    """
    if attention_fn is None:
        within, why = decoder_attention, None
        if mesh is not None:
            within = bind(attend_on_mesh, mesh=mesh)
            if mesh.shape["context"] > 1:
                why = (
                    f"segment_ids must be None for context={mesh.shape['context']}, "
                    "where tokens go round in ring_attention, which has no mask"
                )
        return CausalAttention(
            bind(within, is_causal=True, **options),
            bind(_by_mask, attention_fn=bind(decoder_attention, **options)),
            None,
            why,
            True,
        )
    check_callable("TransformerLM", "attention_fn", attention_fn)
    names = _options_of(attention_fn)
    if has_sinks and not takes_return_lse(attention_fn):
        raise ValueError(
            "TransformerLM: attention_fn must have an option return_lse for "
            "attention_sinks, got one without"
        )
    within = given = bind(attention_fn, **options)
    if "is_causal" in names:
        within = bind(given, is_causal=True)
    why_no_cache = why_no_documents = None
    if "axis_name" in names:
        why_no_cache = (
            "attention_fn must have all tokens in one place for a cache, got one with "
            "an option axis_name"
        )
    takes_mask = {"is_causal", "mask"} <= names and "mask" not in _bound(attention_fn)
    if takes_mask:
        to_cache = bind(_by_mask, attention_fn=bind(given, is_causal=False))
        if "segment_ids" not in names:
            within = bind(_with_documents, attention_fn=within)
    else:
        to_cache = bind(_in_place, attention_fn=within)
        if "segment_ids" not in names:
            why_no_documents = (
                "attention_fn must have an option segment_ids, or both is_causal and "
                "mask, for segment_ids, got one without"
            )
    return CausalAttention(within, to_cache, why_no_cache, why_no_documents, takes_mask)


def _options_of(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's parameters."""
    return {*inspect.signature(function).parameters}


def _bound(function: Any) -> dict[str, Any]:
    return function.keywords if isinstance(function, partial) else {}


def _with_documents(
    query, key, value, *, attention_fn, segment_ids=None, mask=None, **options
):
    """Attend within documents by a function that takes a mask."""
    if segment_ids is not None:
        own = same_document(segment_ids)
        mask = own if mask is None else mask & own
    if mask is not None:
        options["mask"] = mask
    return attention_fn(query, key, value, **options)


def _by_mask(query, keys, values, *, seen, positions, attention_fn, **options):
    """Attend to the keys that are seen, by a function that takes a mask."""
    return attention_fn(query, keys, values, mask=seen, **options)


def _in_place(query, keys, values, *, seen, positions, attention_fn, **options):
    """Attend by a causal function that is called with as many queries as keys.

    Its result for a query depends on no other query, so zeros stand for the earlier
    ones, and no key after the query's own is seen.
    """
    batch, _, heads, dim = query.shape
    rows = jnp.arange(batch)[:, None]
    queries = jnp.zeros((batch, keys.shape[1], heads, dim), query.dtype)
    queries = queries.at[rows, positions].set(query, mode="drop")
    results = attention_fn(queries, keys, values, **options)
    return jax.tree.map(
        lambda x: x.at[rows, positions].get(mode="fill", fill_value=0), results
    )
