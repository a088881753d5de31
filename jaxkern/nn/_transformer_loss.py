"""The loss of the language model."""

from typing import Any, Literal, overload

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Integer

from .._core.checks import Number
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
        _check_counted(op, targets, where, ignore_index, self.vocab_size)
        loss_options: dict[str, Any] = {
            "z_loss": z_loss,
            "label_smoothing": label_smoothing,
        }
        softcap = self.logit_softcap if softcap is None else softcap
        loss_options |= {"softcap": softcap, "chunk": chunk}
        pair = self._mean_loss_and_lse(
            tokens, targets, where, ignore_index, positions, loss_options, options
        )
        return pair if return_lse else pair[0]

    @on_automatic_axes(lambda tokens: (P(), P(*tokens)))
    def _mean_loss_and_lse(
        self, tokens, targets, where, ignore_index, positions, loss_options, options
    ):
        op = "TransformerLM.loss"
        tokens, order, inverse = self._order(op, tokens)
        features = self._features(op, tokens, positions, order, options)
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
        if where is None:
            return losses.mean(), lse
        count = jnp.maximum(where.sum(), 1).astype(losses.dtype)
        return losses.sum() / count, lse


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
