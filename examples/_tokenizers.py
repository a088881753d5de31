"""How the training example turns documents into tokens: as bytes, or by a file.

The file is a `tokenizer.json`, which the package `tokenizers` reads.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Tokenizer(Protocol):
    """Encodes documents and decodes tokens.

    Each document ends with the token `end`, if it is not None.
    """

    unit: str
    vocab_size: int
    end: int | None

    def encode(self, document: bytes) -> np.ndarray: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class Bytes:
    """Each byte is a token."""

    unit, vocab_size = "byte", 256
    end: int | None = None

    def encode(self, document: bytes) -> np.ndarray:
        return np.frombuffer(document, np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write nothing: bytes need no file."""


class FromFile:
    """The tokenizer of a file, with the special tokens that it adds to a text.

    A document ends with the `eos_token` of the `tokenizer_config.json` beside it, if
    there is one.
    """

    unit = "token"
    end: int | None

    def __init__(self, path: Path):
        import tokenizers

        self.path = path
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The package raises `Exception` itself, whatever is wrong.
        except Exception as error:
            sys.exit(f"--tokenizer must be a tokenizer.json, got {path}: {error}")
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.end = self._find_end(path.with_name("tokenizer_config.json"))

    def _find_end(self, path: Path) -> int | None:
        settings: dict[str, Any] = {}
        if path.exists():
            settings = json.loads(path.read_text())
        token = settings.get("eos_token")
        # It is a string, or an object that has one.
        name = token.get("content") if isinstance(token, dict) else token
        return self.tokenizer.token_to_id(name) if name else None

    def encode(self, document: bytes) -> np.ndarray:
        ids = self.tokenizer.encode(document.decode(errors="replace")).ids
        if ids and self.end is not None and ids[-1] != self.end:
            ids.append(self.end)
        return np.array(ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens))

    def save(self, folder: Path) -> None:
        """Copy the file, and those beside it that transformers reads with it."""
        for name in FILES:
            file = self.path.with_name(name)
            if file.exists():
                shutil.copy(file, folder / name)


def read_tokenizer(args: argparse.Namespace) -> Tokenizer:
    return Bytes() if args.tokenizer is None else FromFile(args.tokenizer)
