"""The loss of the language model."""

from typing import Any, Literal, overload

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Integer

from .._core.checks import Number, check_array
from .._core.sharding import on_automatic_axes
from .._cross_entropy import (
    check_loss_options,
    check_targets,
    cross_entropy,
    read_targets,
)
from ._common import check_range, known
from ._transformer_forward import Forward, take


class Loss(Forward):
    """A language model's loss."""

    @overload
    def loss(
        self,
        tokens: Array,
        targets: Array,
        *,
        return_lse: Literal[False] = ...,
        **options: Any,
    ) -> Array: ...

    @overload
    def loss(
        self,
        tokens: Array,
        targets: Array,
        *,
        return_lse: Literal[True],
        **options: Any,
    ) -> tuple[Array, Array]: ...

    @overload
    def loss(
        self, tokens: Array, targets: Array, *, return_lse: bool, **options: Any
    ) -> Array | tuple[Array, Array]: ...

    def loss(
        self,
        tokens: Integer[Array, "batch seq"],
        targets: Integer[Array, "batch seq"],
        *,
        where: Bool[Array, "batch seq"] | None = None,
        ignore_index: int | None = None,
        z_loss: Number = 0.0,
        label_smoothing: Number = 0.0,
        softcap: float | None = None,
        return_lse: bool = False,
        positions: Integer[Array, " seq"] | Integer[Array, "batch seq"] | None = None,
        segment_ids: Integer[Array, "batch seq_or_one_more"] | None = None,
        chunk: int = 4096,
        **options: Any,
    ) -> Float[Array, ""] | tuple[Float[Array, ""], Float[Array, "batch seq"]]:
        """Return the mean of `jaxkern.cross_entropy` over the tokens that count.

        Args:
            tokens: As in the call.
            targets: The token to predict at each token, usually the next.
            where: False for tokens that do not count in the mean; None counts all.
            ignore_index: Tokens with this target do not count either, as -100 in data
                prepared for PyTorch or for Hugging Face's models.
            z_loss: The factor of the squared log-sum-exp that is added to the loss of
                each token, as PaLM (1e-4), Chameleon and OLMo 2 train.
            label_smoothing: The part of the target's probability that is spread over
                the vocabulary, as models of translation train (0.1).
            softcap: As in `jaxkern.cross_entropy`; None for the model's
                `logit_softcap`.
            return_lse: Also return the log-sum-exp of each token's logits, which models
                with a z-loss log.
            positions: As in the call.
            segment_ids: As in the call. The last token of a document does not count if
                another follows it in its row, because its target is not of its
                document. The ids may have one more column, for the target of the last
                token, so that `segment_ids` goes with `tokens[:, :-1]` and
                `tokens[:, 1:]`; without it the last token counts.
            chunk: As in `jaxkern.cross_entropy`.
            options: As in the call.

        Returns:
            The mean loss, a scalar; it is 0 if no token counts. With `return_lse` a
            pair of it and the log-sum-exp, which is 0 for tokens that do not count.

        Raises:
            TypeError: An array has another dtype, or an option another type, than in
                the call and in `jaxkern.cross_entropy`.
            ValueError: A shape does not fit, an option is out of range, or the sequence
                is too long; or a token or a target that counts is out of range, which
                is checked outside of `jit` only.
        """
        op = "TransformerLM.loss"
        self._check_tokens(op, "tokens", tokens)
        given = f" for tokens of shape {tokens.shape}"
        check_targets(op, targets, where, ignore_index, tokens.shape, given)
        check_loss_options(op, chunk, z_loss, label_smoothing, softcap, return_lse)
        if segment_ids is not None:
            check_array(op, "segment_ids", segment_ids, "integer")
            segment_ids, inside = _read_segment_ids(segment_ids, tokens.shape[1])
            self._check_segment_ids(op, segment_ids, tokens.shape)
            where = inside if where is None else where & inside
        _check_counted(op, targets, where, ignore_index, self.vocab_size)
        loss_options: dict[str, Any] = {
            "z_loss": z_loss,
            "label_smoothing": label_smoothing,
        }
        softcap = self.config.logit_softcap if softcap is None else softcap
        loss_options |= {"softcap": softcap, "chunk": chunk}
        pair = self._mean_loss_and_lse(
            tokens,
            targets,
            where,
            ignore_index,
            positions,
            segment_ids,
            loss_options,
            options,
        )
        return pair if return_lse else pair[0]

    @on_automatic_axes(lambda tokens: (P(), P(*tokens)))
    def _mean_loss_and_lse(
        self,
        tokens,
        targets,
        where,
        ignore_index,
        positions,
        segment_ids,
        loss_options,
        options,
    ):
        op = "TransformerLM.loss"
        tokens, order, inverse = self._order(op, tokens)
        features = self._features(op, tokens, positions, segment_ids, order, options)
        targets, where = read_targets(targets, where, ignore_index)
        targets, where = take(targets, order), take(where, order)
        losses, lse = cross_entropy(
            features,
            self._head(),
            targets,
            where=where,
            return_lse=True,
            **loss_options,
        )
        lse = take(lse, inverse)
        count = losses.size if where is None else where.sum()
        return losses.sum() / jnp.maximum(count, 1).astype(losses.dtype), lse


def _read_segment_ids(segment_ids: Any, seq: int) -> tuple[Any, Any]:
    """Return the ids of the tokens, and where a target is of its token's document."""
    inside = segment_ids[:, 1:] == segment_ids[:, :-1]
    if segment_ids.shape[1] == seq:
        inside = jnp.pad(inside, ((0, 0), (0, 1)), constant_values=True)
    elif segment_ids.shape[1] == seq + 1:
        segment_ids = segment_ids[:, :-1]
    return segment_ids, inside


def _check_counted(
    op: str, targets: Any, where: Any, ignore_index: int | None, vocab_size: int
) -> None:
    """Check that targets that count are in the vocabulary, if their values are known.

    Inside `jit` the loss of other targets is NaN.
    """
    values, counts = known(targets), None if where is None else known(where)
    if values is None or (where is not None and counts is None):
        return
    if counts is not None:
        values = values[counts]
    if ignore_index is not None:
        values = values[values != ignore_index]
    check_range(op, "targets", values, 0, vocab_size - 1)
