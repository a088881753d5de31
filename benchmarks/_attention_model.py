"""Shapes and patterns of `benchmarks.attention`, and the work that they take."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

import jaxkern

from ._harness import FORWARD, KERNEL, PICKED, XLA
from ._report import published

BLOCK = 128
# Resident in every published peak: weights of three modules, and six inputs.
PUBLISHED_WEIGHTS_MIB, PUBLISHED_INPUTS = 12.04, 6


@dataclass(frozen=True)
class Shape:
    """group: query heads that read one key head."""

    batch: int
    seq: int
    heads: int
    dim: int = 64
    group: int = 1

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Shape":
        group = row["num_heads"] // row["num_kv_heads"]
        names = "batch", "seq", "num_heads", "head_dim"
        return cls(*(int(row[name]) for name in names), group=group)

    def __str__(self) -> str:
        """With the key heads, where they are fewer."""
        heads = f"{self.heads}/{self.kv_heads}" if self.group > 1 else self.heads
        return f"({self.batch}, {self.seq}, {heads}, {self.dim})"

    @property
    def kv_heads(self) -> int:
        return self.heads // self.group

    @property
    def sizes(self) -> dict[str, int]:
        """The columns of a row."""
        heads = {"num_heads": self.heads, "num_kv_heads": self.kv_heads}
        return {"batch": self.batch, "seq": self.seq} | heads | {"head_dim": self.dim}

    @property
    def embed(self) -> int:
        return self.heads * self.dim

    @property
    def bytes(self) -> int:
        """Bytes of a query, key, value or output in float32."""
        return 4 * self.batch * self.seq * self.embed


@dataclass(frozen=True)
class Dense:
    """Every query sees every key, or none after it."""

    is_causal: bool = False

    def __str__(self) -> str:
        return "causal" if self.is_causal else "dense"

    def pairs(self, seq: int) -> float:
        """Queries times keys that a head computes."""
        return _pairs(seq, self.is_causal)

    def counts(self, shape: Shape, rows: np.ndarray) -> np.ndarray:
        """(1 or heads, rows, seq): how often a query meets a key in one softmax."""
        keys = np.arange(shape.seq)
        seen = np.ones((1, len(rows), shape.seq), np.int8)
        return seen * (keys <= rows[:, None]) if self.is_causal else seen


@dataclass(frozen=True)
class Dilated:
    """LongNet's patterns: segments of w tokens, of which a head takes every r-th."""

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    is_causal: bool = False
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name} causal" if self.is_causal else self.name

    def _patterns(self, seq: int) -> list[tuple[int, int]]:
        lengths = (min(w, seq) for w in self.segment_lengths)
        return list(zip(lengths, self.dilation_rates, strict=True))

    def pairs(self, seq: int) -> float:
        """As a pattern costs 4 batch heads n w dim / r^2: n/w segments of w/r rows."""
        return sum(
            seq / w * _pairs(w / r, self.is_causal) for w, r in self._patterns(seq)
        )

    def counts(self, shape: Shape, rows: np.ndarray) -> np.ndarray:
        head = np.arange(shape.heads)[:, None, None]
        q, k = rows[:, None], np.arange(shape.seq)
        counts = np.zeros((shape.heads, len(rows), shape.seq), np.int8)
        for w, r in self._patterns(shape.seq):
            taken = (q % w % r == head % r) & (k % w % r == head % r)
            counts += taken & (q // w == k // w)
        return counts * (k <= q) if self.is_causal else counts


@dataclass(frozen=True)
class Blocks:
    """A mask of blocks of 128 queries and keys.

    which: "near", a block and its two neighbours; "causal"; "window" of 1/16 of the
        sequence to both sides; "global+local", the first 1/128 and a window of 1/32;
        "documents" of 1/8, causal; or a percentage of all blocks.
    heads: of a percentage. None spreads it evenly over the rows of one mask for all
        heads; else blocks are drawn for each head, of which rows have more or less.
    """

    which: str | int
    heads: int | None = None

    def __str__(self) -> str:
        return self.which if isinstance(self.which, str) else f"{self.which}%"

    def grid(self, seq: int) -> np.ndarray:
        """(heads, q_blocks, kv_blocks) of a percentage."""
        n = seq // BLOCK
        wanted = max(1, round(n * n * int(self.which) / 100))
        random = np.random.default_rng(0)
        if self.heads is None:
            i, j = np.indices((n, n))
            # In every row the same number of columns, more or less one.
            ranks = random.permuted(j, axis=1)
            return (ranks < (wanted * (i + 1)) // n - (wanted * i) // n)[None]
        ranks = np.tile(np.arange(n * n), (self.heads, 1))
        return (random.permuted(ranks, axis=1) < wanted).reshape(self.heads, n, n)

    def visible(self, seq: int, q, k):
        """Which pairs of positions attend by a rule, in NumPy or in PyTorch."""
        match self.which:
            case "near":
                return abs(q // BLOCK - k // BLOCK) <= 1
            case "causal":
                return k <= q
            case "window":
                return abs(q - k) <= seq // 16
            case "global+local":
                first = seq // 128
                return (abs(q - k) <= seq // 32) | (q < first) | (k < first)
        return (q // (seq // 8) == k // (seq // 8)) & (k <= q)

    def mask(self, seq: int) -> jaxkern.BlockMask:
        if isinstance(self.which, int):
            return self.mask_of_grid(self.grid(seq))
        make, size = jaxkern.BlockMask, {"block_size": BLOCK}
        match self.which:
            case "near":
                return make.dilated(seq, seq, rates=[1], **size)
            case "causal":
                return make.causal(seq, seq, **size)
            case "window":
                return make.local_window(seq, seq, window=seq // 16, **size)
            case "global+local":
                sizes = {"global_tokens": seq // 128, "window": seq // 32}
                return make.global_local(seq, seq, **sizes, **size)
        ids = np.arange(seq) // (seq // 8)
        return make.document(ids, **size) & make.causal(seq, seq, **size)

    @staticmethod
    def mask_of_grid(grid: np.ndarray) -> jaxkern.BlockMask:
        return jaxkern.BlockMask.from_blocks(grid, block_size=BLOCK)

    def pairs(self, seq: int) -> float:
        """Whole blocks are computed."""
        return float(known_mask(self, seq).density) * float(seq) ** 2

    def counts(self, shape: Shape, rows: np.ndarray) -> np.ndarray:
        q, k = rows[:, None], np.arange(shape.seq)
        if isinstance(self.which, int):
            return self.grid(shape.seq)[:, q // BLOCK, k // BLOCK].astype(np.int8)
        return self.visible(shape.seq, q, k)[None].astype(np.int8)


@lru_cache
def known_mask(pattern: Blocks, seq: int) -> jaxkern.BlockMask:
    """Made once for all that only reads it."""
    return pattern.mask(seq)


Pattern = Dense | Dilated | Blocks


def _pairs(seq: float, is_causal: bool) -> float:
    return seq * (seq + 1) / 2 if is_causal else seq**2


@dataclass(frozen=True)
class Task:
    """The computation of a row, whoever does it.

    module: None for attention alone; "plain" with the four projections of a multi-head
        module around it; "norms" also with norms of query, of key and of the result.
    scale: the standard deviation of query, key and value.
    """

    shape: Shape
    pattern: Pattern
    module: str | None = None
    scale: float = 1.0

    @property
    def variant(self) -> str:
        modules = {"norms": ", multi-head with norms", "plain": ", multi-head"}
        return f"{self.pattern}{modules.get(self.module or '', '')}"

    def flops(self, which: str) -> float:
        """FLOPs of the matmuls; the backward computes the logits again: 5 for 2."""
        s = self.shape
        pairs = self.pattern.pairs(s.seq)
        attention = 4.0 * s.batch * s.heads * s.dim * pairs
        projections = 8.0 * s.batch * s.seq * s.embed**2 if self.module else 0.0
        if which == FORWARD:
            return attention + projections
        return 3.5 * attention + 3 * projections


@dataclass(frozen=True)
class Published:
    """One published row; figures are None where it failed."""

    shape: Shape
    time_ms: float | None
    memory_mib: float | None
    tokens_per_s: float | None

    @property
    def net_mib(self) -> float | None:
        """MiB that it allocated beside weights and inputs, which were resident."""
        if self.memory_mib is None:
            return None
        inputs = PUBLISHED_INPUTS * self.shape.bytes / 2**20
        return self.memory_mib - PUBLISHED_WEIGHTS_MIB - inputs


def _read() -> dict[tuple[str, Shape], Published]:
    rows = {}
    for line in published("attention"):
        sizes = (int(line[x]) for x in ("batch_size", "seq_len", "num_heads"))
        columns = "time_ms", "memory_mb", "tokens_per_s"
        ok, shape = line["status"] == "ok", Shape(*sizes)
        figures = (float(line[column]) if ok else None for column in columns)
        rows[line["implementation"], shape] = Published(shape, *figures)
    return rows


PUBLISHED = _read()
# The published names, and for each our op, the pattern and the module around it.
IMPLEMENTATIONS: dict[str, tuple[str, Pattern, str | None]] = {
    "standard": ("attention", Dense(), None),
    "improved": ("dilated_attention", Dense(), None),
    "ring_v2_collective": ("ring_attention", Dense(), None),
    "multihead_standard": ("attention", Dense(), "norms"),
    "multihead_improved": ("dilated_attention", Dense(), "norms"),
    "block_sparse": ("block_sparse_attention", Blocks("near"), None),
    "block_sparse_multihead": ("block_sparse_attention", Blocks("near"), "plain"),
}


def published_of(row: Mapping[str, Any]) -> Published | None:
    """The published row of one of ours, by its op and variant."""
    if row["grid"] != "published" or row["by"] not in (KERNEL, XLA, PICKED):
        return None
    shape = Shape.of(row)
    for name, (op, pattern, module) in IMPLEMENTATIONS.items():
        if (op, Task(shape, pattern, module).variant) == (row["op"], row["variant"]):
            return PUBLISHED.get((name, shape))
    return None
