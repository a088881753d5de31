"""Data sets of any size, which `train_lm.py --data` reads by grain.

A file that ends in .npy has an array of tokens, which stays on the disk; a row is a
part of it. Other files are ArrayRecords, in which each record is a document, which is
encoded when it is read. grain shuffles the rows or the documents anew in each epoch.
"""

import argparse
import sys
from typing import Any

import grain
import jax
import numpy as np
from _documents import HELD_OUT, Batch, make_specs
from _tokenizers import Tokenizer


class TokenFile:
    """The rows of a file of tokens; each starts with the last token of the one before.

    If documents have a last token, a row says which token is of which document.
    """

    def __init__(self, path: Any, context_length: int, end: int | None):
        self.tokens = np.load(path, mmap_mode="r")
        self.context_length, self.end = context_length, end
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            shape, dtype = self.tokens.shape, self.tokens.dtype
            raise ValueError(
                f"{path} must hold integers (tokens,), got {shape} {dtype}"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context_length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self.context_length
        tokens = self.tokens[start : start + self.context_length + 1].astype(np.int32)
        if self.end is None:
            return {"tokens": tokens}
        ends = np.cumsum(tokens[:-1] == self.end, dtype=np.int32)
        return {"tokens": tokens, "segment_ids": np.append(np.int32(0), ends) + 1}


class DataSet:
    """Batches of a data set, and the state from which a run resumes exactly.

    Each process reads all rows, and gives its devices theirs. So a run resumes with any
    number of processes.
    """

    def __init__(
        self, args: argparse.Namespace, mesh: jax.sharding.Mesh, tokenizer: Tokenizer
    ):
        self.args, self.tokenizer = args, tokenizer
        self.in_tokens = args.data[0].suffix == ".npy"
        try:
            records = self._open()
        # NumPy raises the first three, and array_record the last one.
        except (OSError, EOFError, ValueError, RuntimeError) as error:
            sys.exit(f"--data must be files of tokens or ArrayRecords: {error}")
        held_out = max(1, int(len(records) * HELD_OUT))
        kind = "rows" if self.in_tokens else "documents"
        if len(records) <= held_out:
            sys.exit(f"--data must have at least 2 {kind}, got {len(records)}")
        packed = not self.in_tokens or tokenizer.end is not None
        self.specs = make_specs(args, mesh, packed)
        train = records[:-held_out].seed(args.seed).shuffle()
        self.iterator = iter(self._make_batches(train, args.accumulate * args.batch))
        self.held_out = self._make_batches(records[-held_out:], args.batch)
        self.description = f"{len(train)} {kind} to learn from"
        # A hash would have to read all of it.
        size = sum(path.stat().st_size for path in args.data)
        self.identity = {"data_bytes": str(size), "data_records": str(len(records))}

    def _open(self) -> grain.MapDataset:
        if not self.in_tokens:
            paths = [str(path) for path in self.args.data]
            # Its argument has another name than a source's.
            source: Any = grain.sources.ArrayRecordDataSource(paths)
            return grain.MapDataset.source(source)
        context, end = self.args.context_length, self.tokenizer.end
        files = [TokenFile(path, context, end) for path in self.args.data]
        # grain has no empty sources.
        sources = [grain.MapDataset.source(file) for file in files if len(file)]
        return grain.MapDataset.concatenate(sources)

    def _make_batches(self, records: grain.MapDataset, rows: int) -> grain.IterDataset:
        records = records.repeat()
        if self.in_tokens:
            return records.to_iter_dataset().batch(rows)

        def encode(document: bytes) -> dict[str, np.ndarray]:
            return {"tokens": self.tokenizer.encode(document).astype(np.int32)}

        def name(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            ids = row["tokens_segment_ids"].astype(np.int32)
            return {"tokens": row["tokens"], "segment_ids": ids}

        length = {"tokens": self.args.context_length + 1}
        documents = records.map(encode).to_iter_dataset()
        pack = grain.experimental.ConcatThenSplitIterDataset
        return pack(documents, length_struct=length).map(name).batch(rows)

    def batch(self, step: int) -> Batch:
        return self._share(next(self.iterator), self.args.accumulate)

    def held_out_batches(self, count: int) -> list[Batch]:
        rows = iter(self.held_out)
        return [self._share(next(rows), 1) for _ in range(count)]

    def state(self) -> dict[str, Any]:
        return self.iterator.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        self.iterator.set_state(state)

    def baseline(self) -> None:
        """Return nothing, because the data set is not read for it."""

    def _share(self, rows: dict[str, np.ndarray], parts: int) -> Batch:
        tokens, most = rows["tokens"], self.tokenizer.vocab_size
        if tokens.min() < 0 or tokens.max() >= most:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            sys.exit(f"--data must have tokens from 0 to {most - 1}, got {wrong}")
        batch = {}
        for name, spec in self.specs.items():
            whole = rows[name].reshape(parts, self.args.batch, -1)
            read = whole.__getitem__
            batch[name] = jax.make_array_from_callback(whole.shape, spec.sharding, read)
        return batch
