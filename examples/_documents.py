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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from _tokenizers import Bytes, Tokenizer

HELD_OUT = 0.05
Batch = dict[str, jax.Array]


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


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files, and those in folders, sorted, but for hidden ones."""
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


def read_files(paths: Sequence[Path] | None) -> list[bytes]:
    """Return the documents, one a file.

    None gives a single one: all modules of the standard library, one after another.
    """
    if paths is not None:
        return [file.read_bytes() for file in find_files(paths)]
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [b"\n".join(module.read_bytes() for module in modules)]


def read_text(paths: Sequence[Path] | None, tokenizer: Tokenizer | None = None) -> Text:
    """Read and encode documents; those without a token are left out."""
    tokenizer = tokenizer or Bytes()
    documents = [tokenizer.encode(document) for document in read_files(paths)]
    documents = [document for document in documents if len(document)]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    tokens = np.concatenate(documents) if documents else np.zeros(0, np.uint8)
    return Text(tokens, starts)


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Return the loss of a model that knows only how often each token occurs."""
    p = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    return float(-np.log(p[held_out]).mean())


Specs = Mapping[str, jax.ShapeDtypeStruct]


def make_specs(
    args: argparse.Namespace, mesh: jax.sharding.Mesh, packed: bool
) -> Specs:
    """Return what a batch is: parts, rows and places, whose rows the devices share."""
    rows = jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp")))
    shape = args.accumulate, args.batch, args.context_length + 1
    names = ("tokens", "segment_ids") if packed else ("tokens",)
    spec = jax.ShapeDtypeStruct(shape, np.int32, sharding=rows)
    return dict.fromkeys(names, spec)


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
        tokenizer: Tokenizer | None = None,
    ):
        self.args, self.tokenizer = args, tokenizer or Bytes()
        unit = self.tokenizer.unit
        self.train, self.held_out = text.split(args.context_length, unit)
        self.specs = make_specs(args, mesh, packed=len(text.starts) > 1)
        self.description = f"{len(self.train.tokens)} {unit}s to learn from"
        # Without this, a run could resume with another text of the same name.
        self.identity = {"text_sha256": hash_of(text)}

    def batch(self, step: int) -> Batch:
        return self._draw(self.train, self.args.accumulate, step)

    def held_out_batches(self, count: int) -> list[Batch]:
        return [self._draw(self.held_out, 1, i, 1) for i in range(count)]

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

        def places(part: Any) -> np.ndarray:
            return starts[part[:2]][..., None] + np.arange(length + 1)[part[2]]

        reads = {
            "tokens": lambda part: text.tokens[places(part)].astype(np.int32),
            "segment_ids": lambda part: text.documents_at(places(part)),
        }
        shape = *starts.shape, length + 1
        return {
            name: jax.make_array_from_callback(shape, spec.sharding, reads[name])
            for name, spec in self.specs.items()
        }


def hash_of(text: Text) -> str:
    """Return what another text would not have, of the same name or not."""
    digest = hashlib.sha256(np.ascontiguousarray(text.tokens))
    digest.update(text.starts.astype(np.int64).tobytes())
    return digest.hexdigest()
