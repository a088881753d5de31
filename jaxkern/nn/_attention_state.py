"""The dropout, the stored weights and the cache of `MultiHeadAttention`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax

from .._core.checks import check_dtype, check_flag, check_integer, check_shape, kind_of
from ._common import known

# The variables of the cache, with flax's names.
CACHED = "cached_key", "cached_value", "cache_index"


class Result(NamedTuple):
    """The output of a call, and what the module stores afterwards, if anything."""

    out: Any
    weights: Any
    cache: Any


class Sown(NamedTuple):
    """Takes the weights that an attention function sows."""

    weights: list[jax.Array]

    def sow(self, kind: Any, name: str, value: jax.Array) -> None:
        """Keep the weights, as `nnx.Module.sow` does."""
        self.weights.append(value)


def first_flag(op: str, name: str, *values: bool | None) -> bool | None:
    """Return the first value that is not None, which must be a flag; or None."""
    value = next((x for x in values if x is not None), None)
    if value is not None:
        check_flag(op, **{name: value})
    return value


def dropout_options(
    module: Any,
    deterministic: bool | None,
    rngs: nnx.Rngs | nnx.RngStream | None,
) -> dict[str, Any]:
    """Return the options with which an attention function drops weights."""
    if not module.dropout_rate:
        return {}
    op, because = "MultiHeadAttention", f" for dropout_rate={module.dropout_rate}"
    deterministic = first_flag(op, "deterministic", deterministic, module.deterministic)
    if deterministic is None:
        raise ValueError(
            f"{op}: deterministic must be True or False{because}, got None in the "
            "call and in the module; module.train() and module.eval() set it"
        )
    if deterministic:
        return {}
    stream = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs or module.rngs
    if not isinstance(stream, nnx.RngStream):
        raise ValueError(
            f"{op}: rngs must be an nnx.Rngs or an nnx.RngStream{because} unless "
            f"the module keeps one, got {kind_of(stream)}"
        )
    return {
        "dropout_rng": stream(),
        "dropout_rate": module.dropout_rate,
        "broadcast_dropout": module.broadcast_dropout,
        "deterministic": False,
    }


def empty_cache(
    input_shape: tuple[int, ...], dtype: Dtype, kv_heads: int, dim: int
) -> list[jax.Array]:
    """Return keys and values for all tokens of (batch, seq, embed), and the number 0.

    No two are the same array, so that all can be donated.
    """
    op = "MultiHeadAttention.init_cache"
    check_dtype(op, "dtype", dtype)
    if len(input_shape) != 3:
        raise ValueError(
            f"{op}: input_shape must be (batch, seq, embed), got {input_shape}"
        )
    sizes = [check_integer(op, "input_shape", x, 0) for x in input_shape[:2]]
    keys, values = (jnp.zeros((*sizes, kv_heads, dim), dtype) for _ in range(2))
    return [keys, values, jnp.zeros((), jnp.int32)]


def read_cache(module: Any, query: jax.Array, key: jax.Array) -> list[jax.Array]:
    """Return keys, values and length of the cache, with room for the tokens."""
    op = "MultiHeadAttention"
    variables = [getattr(module, name) for name in CACHED]
    keys, values, length = (None if x is None else x[...] for x in variables)
    if keys is None or values is None or length is None:
        raise ValueError(f"{op}: init_cache must be called before decode=True")
    batch, seq = query.shape[:2]
    if keys.shape[0] != batch:
        raise ValueError(
            f"{op}: query must have the batch of the cache, {keys.shape[0]}, "
            f"got {query.shape}"
        )
    check_shape(op, "key", key, (batch, seq, key.shape[2]), " for decode=True")
    taken = known(length)
    if seq > keys.shape[1] - (0 if taken is None else int(taken)):
        raise ValueError(
            f"{op}: query must fit into the cache of {keys.shape[1]} tokens, of "
            f"which {0 if taken is None else taken} are taken, got {seq} more"
        )
    return [keys, values, length]


def attend_to_cache(
    function: Callable[..., Any],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: list[jax.Array],
) -> tuple[Any, list[jax.Array]]:
    """Attend causally to the tokens of a cache and to new ones behind them.

    Args:
        function: An attention function with a mask. One that it holds already hides
            keys as well.
        query: The queries of the new tokens.
        key: Their keys.
        value: Their values.
        cache: Keys, values and the number of tokens, as `read_cache` returns them.

    Returns:
        The results, and the cache with the new tokens.
    """
    keys, values, length = cache
    seq = query.shape[1]
    keys, values = (
        lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), length, 1)
        for kept, new in [(keys, key), (values, value)]
    )
    order = jnp.arange(seq, dtype=length.dtype)
    places = jnp.arange(keys.shape[1], dtype=length.dtype)
    seen = (places[None] <= (length + order)[:, None])[None, None]
    if isinstance(function, partial) and "mask" in function.keywords:
        mask = function.keywords["mask"]
        seen = seen if mask is None else seen & mask
    cached = promote_dtype((query, keys, values), dtype=query.dtype)
    # The mask says more than `is_causal`, which would count the queries from 0.
    out = function(*cached, mask=seen, is_causal=False)
    return out, [keys, values, length + seq]
