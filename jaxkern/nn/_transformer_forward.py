"""The language model from tokens to features and logits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer

from .._attention.context_parallel import ring_permutation
from .._attention.decoder import number_documents
from .._attention.rotary import read_positions
from .._core.checks import check_array, check_shape
from .._core.precision import widen
from .._core.sharding import on_automatic_axes
from ._common import check_tokens, read_tokens
from ._layers import run_layers
from ._sharding import BATCH, check_batch
from ._transformer_block import LayerKind
from ._transformer_options import TransformerConfig


class Forward(nnx.Module):
    """A language model's way from tokens to features and logits.

    `TransformerLM` makes the parameters.
    """

    embedding: nnx.Param[jax.Array]
    layers: Any
    norm: nnx.Module
    head: nnx.Param[jax.Array] | None
    kinds: Sequence[LayerKind]
    vocab_size: int
    context_length: int
    config: TransformerConfig
    dtype: Dtype
    remat: bool
    scan_layers: bool
    mesh: Mesh | None
    why_no_documents: str | None

    def __call__(
        self,
        tokens: Integer[Array, "batch seq"],
        positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
        *,
        segment_ids: Integer[Array, "batch seq"] | None = None,
        **options: Any,
    ) -> Float[Array, "batch seq vocab"]:
        """Return the logits of each next token, in float32.

        Args:
            tokens: The tokens, from 0 to vocab_size - 1. Outside of `jit` that is
                checked; inside, other tokens give NaN.
            positions: The positions of the tokens; None for 0, 1, 2 and so on, from
                the beginning of each document.
            segment_ids: For rows that pack several documents, as all models are
                trained: the document of each token. Neighbours with equal ids are of
                one document, whose tokens see no other document's. None for one
                document a row.
            options: The options of this call to `attention_fn`.

        Returns:
            The logits.

        Raises:
            TypeError: `tokens` is not an integer array.
            ValueError: `tokens` has another shape, a token is out of range, the
                sequence is too long, or there are `segment_ids` and the model cannot
                keep documents apart: its `attention_fn` has neither an option
                `segment_ids` nor both `is_causal` and `mask`, or its mesh shares tokens
                along "context".
        """
        features = self.features(tokens, positions, segment_ids=segment_ids, **options)
        return self.logits(features)

    @on_automatic_axes(lambda tokens: P(*tokens, None))
    def features(
        self,
        tokens: Integer[Array, "batch seq"],
        positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
        *,
        segment_ids: Integer[Array, "batch seq"] | None = None,
        **options: Any,
    ) -> Float[Array, "batch seq embed_dim"]:
        """Return the features that the head is applied to.

        Args:
            tokens: As in the call.
            positions: As in the call.
            segment_ids: As in the call.
            options: As in the call.

        Returns:
            The features of each token.

        Raises:
            TypeError: As in the call.
            ValueError: As in the call.
        """
        op = "TransformerLM"
        self._check_tokens(op, "tokens", tokens)
        if segment_ids is not None:
            self._check_segment_ids(op, segment_ids, tokens.shape)
        tokens, order, inverse = self._order(op, tokens)
        features = self._features(op, tokens, positions, segment_ids, order, options)
        return take(features, inverse)

    def _features(self, op, tokens, positions, segment_ids, order, options):
        """Return the features of tokens in the order in which devices share them."""
        if segment_ids is not None:
            segment_ids, places = number_documents(segment_ids)
            positions = places if positions is None else positions
            options = options | {"segment_ids": segment_ids}
        if positions is not None:
            positions = read_positions(op, positions, *tokens.shape)
        if order is not None:
            positions = order if positions is None else positions[..., order]

        def step(kind, x, layer, _):
            return layer(x, positions, kind=kind, **options)

        if self.remat:
            in_scan = self.scan_layers and len(self.kinds) == 1
            step = jax.checkpoint(step, prevent_cse=not in_scan, static_argnums=0)
        tokens = self._share(take(tokens, order), BATCH, "context")
        x = self._share(self._embed(tokens), BATCH, "context", None)
        return self.norm(run_layers(self.layers, self.kinds, step, x))

    @on_automatic_axes(lambda features: P(*features[:-1], None))
    def logits(
        self, features: Float[Array, "*batch embed_dim"]
    ) -> Float[Array, "*batch vocab"]:
        """Apply the head to features, in float32.

        Args:
            features: Features as `features` returns them.

        Returns:
            The logits.
        """
        wide = widen(features[:0]).dtype
        logits = jnp.matmul(features, self._head(), preferred_element_type=wide)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _order(self, op, tokens):
        """Return the tokens, the order in which devices share them, and its inverse.

        Both orders are None where the tokens stay in order.
        """
        tokens = read_tokens(op, "tokens", tokens, self.vocab_size)
        if self.mesh is None:
            return tokens, None, None
        check_batch(op, self.mesh, *tokens.shape)
        rings = self.mesh.shape["context"]
        if rings == 1:
            return tokens, None, None
        orders = ring_permutation(tokens.shape[1], rings, "zigzag")
        return tokens, *map(jnp.asarray, orders)

    def _check_tokens(self, op: str, name: str, tokens: Any) -> None:
        check_tokens(op, name, tokens)
        check_length(op, name, tokens.shape[1], self.context_length)

    def _check_segment_ids(
        self, op: str, segment_ids: Any, shape: tuple[int, ...]
    ) -> None:
        check_array(op, "segment_ids", segment_ids, "integer")
        check_shape(op, "segment_ids", segment_ids, shape)
        if self.why_no_documents is not None:
            raise ValueError(f"{op}: {self.why_no_documents}")

    def _share(self, x: jax.Array, *axes: Any) -> jax.Array:
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

    def _head(self) -> jax.Array:
        head = self.embedding[...].T if self.head is None else self.head[...]
        return head.astype(self.dtype)

    def _embed(self, tokens) -> jax.Array:
        # Without this constraint to whole rows, XLA would gather the gradients of all
        # tokens to split the rows.
        table = self._share(self.embedding[...], P.UNCONSTRAINED, None)
        rows = table.at[tokens]
        x = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        x = x.astype(self.dtype)
        scale = self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)


def take(x: Any, order: jax.Array | None) -> Any:
    """Take tokens (axis 1) in this order; None changes nothing."""
    return x if x is None or order is None else jnp.take(x, order, axis=1)


def check_length(
    op: str, name: str, length: int, most: int, limit: str = "context_length"
) -> None:
    if length > most:
        raise ValueError(
            f"{op}: {name} must be at most {limit}={most} tokens, got {length}"
        )
