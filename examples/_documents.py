"""The text that a model trains on, in memory: documents, their tokens and batches.

Documents stand one after another, and a row of a batch is any window of them, so it is
full. Where there are several documents, a row says of each token which one it is of, so
that no token sees or predicts a token of another. `train_lm.py` uses it.
"""

import argparse
import hashlib
import math
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

HELD_OUT = 0.05
Batch = dict[str, jax.Array]


class Bytes:
    """The tokenizer of models that read bytes."""

    unit, vocab_size = "byte", 256

    def encode(self, document: bytes) -> np.ndarray:
        return np.frombuffer(document, np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Text(NamedTuple):
    """The tokens of all documents, and where each document starts."""

    tokens: np.ndarray
    starts: np.ndarray

    def split(self, context: int, unit: str = "byte") -> tuple["Text", "Text"]:
        """Return the text to train on, and its end, which is held out."""
        at = int(len(self.tokens) * (1 - HELD_OUT))
        if min(at, len(self.tokens) - at) < context + 1:
            least = math.ceil((context + 1) / HELD_OUT)
            sys.exit(
                f"the text must have at least {least} {unit}s "
                f"for --context-length {context}, got {len(self.tokens)}"
            )
        after = self.starts[self.starts > at] - at
        first = np.append(0, after).astype(self.starts.dtype)
        train = Text(self.tokens[:at], self.starts[self.starts < at])
        return train, Text(self.tokens[at:], first)

    def documents_at(self, places: np.ndarray) -> np.ndarray:
        """Return the number of the document of each place, from 1."""
        return np.searchsorted(self.starts, places, side="right").astype(np.int32)


def find_files(paths: Sequence[Path] | None) -> list[Path]:
    """Return the files of a text: of folders all, sorted, but those that are hidden.

    None gives the modules of Python's standard library.
    """
    if paths is None:
        return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        shown = [
            file
            for file in inside
            if not any(name.startswith(".") for name in file.relative_to(path).parts)
        ]
        files += [file for file in shown if not file.is_dir()]
    return files


def read_text(
    paths: Sequence[Path] | None, encode: Callable[[bytes], np.ndarray] | None = None
) -> Text:
    """Read the files of a text, each a document, and encode them, by default as bytes.

    Files without a token are left out.
    """
    encode = encode or Bytes().encode
    documents = [encode(file.read_bytes()) for file in find_files(paths)]
    documents = [document for document in documents if len(document)]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    tokens = np.concatenate(documents) if documents else np.zeros(0, np.uint8)
    return Text(tokens, starts)


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Return the loss of a model that knows only how often each token occurs."""
    p = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    return float(-np.log(p[held_out]).mean())


def share(
    mesh: jax.sharding.Mesh, shape: tuple[int, ...], read: Callable[[Any], np.ndarray]
) -> jax.Array:
    """Return an array of parts, rows and places, whose rows the devices share.

    `read` gets the slices that a device of this process has, and no others.
    """
    rows = jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp")))
    return jax.make_array_from_callback(shape, rows, read)


class Windows:
    """Batches of a text in memory, each of which depends on its place in the run only.

    So a run can resume anywhere, and there is no state to keep. A batch has the rows of
    one update of the weights, in as many parts as `args.accumulate` says. A process
    reads the rows of its own devices only.
    """

    def __init__(
        self,
        text: Text,
        args: argparse.Namespace,
        mesh: jax.sharding.Mesh,
        tokenizer: Any = None,
    ):
        self.args, self.mesh, self.tokenizer = args, mesh, tokenizer or Bytes()
        unit = self.tokenizer.unit
        self.train, self.held_out = text.split(args.context_length, unit)
        self.packed = len(text.starts) > 1
        self.description = f"{len(self.train.tokens)} {unit}s to learn from"

    def batch(self, step: int) -> Batch:
        return self._draw(self.train, self.args.accumulate, step)

    def held_out_batch(self, i: int) -> Batch:
        return self._draw(self.held_out, 1, i, 1)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass

    def baseline(self) -> float:
        """Return the loss that the tokens' frequencies give."""
        train, held_out = self.train.tokens, self.held_out.tokens
        return unigram_loss(train, held_out, self.tokenizer.vocab_size)

    def _draw(self, text: Text, parts: int, *at: int) -> Batch:
        rng = np.random.default_rng((self.args.seed, *at))
        rows, length = parts * self.args.batch, self.args.context_length
        starts = rng.integers(0, len(text.tokens) - length, rows).reshape(parts, -1)
        shape = *starts.shape, length + 1

        def places(part: Any) -> np.ndarray:
            return starts[part[:2]][..., None] + np.arange(length + 1)[part[2]]

        def read(part: Any) -> np.ndarray:
            return text.tokens[places(part)].astype(np.int32)

        batch = {"tokens": share(self.mesh, shape, read)}
        if self.packed:

            def read_documents(part: Any) -> np.ndarray:
                return text.documents_at(places(part))

            batch["segment_ids"] = share(self.mesh, shape, read_documents)
        return batch


def hash_of(text: Text) -> str:
    """Return what another text would not have, of the same name or not."""
    digest = hashlib.sha256(np.ascontiguousarray(text.tokens))
    digest.update(text.starts.astype(np.int64).tobytes())
    return digest.hexdigest()
