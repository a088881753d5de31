"""Programs of `benchmarks.attention`, ours and those of others."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkern
from jaxkern.testing import plain

from . import _attention_definitions as definitions
from . import _torch
from ._attention_model import Blocks, Dense, Dilated, Task
from ._harness import KERNEL, PICKED, PLAIN, XLA, Check, Program, Row, Skip, clock
from ._torch import CUDNN

PEERS = (PLAIN, "jax.nn xla", CUDNN, "tokamax", "torch sdpa")
FLEX = "torch flex"
# By whom a row of ours is computed, and what the op is told.
IMPLEMENTATIONS = {KERNEL: "mosaic_gpu", XLA: "xla", PICKED: None}
# How often a mask is built, which takes milliseconds at most.
MASK_BUILDS = 5
# They hold all logits of a segment at once.
WHOLE = (PLAIN, "jax.nn xla")


@dataclass(frozen=True)
class Entry:
    """A row to be: the op, its arguments, by whom, and on how many devices."""

    grid: str
    op: str
    task: Task
    by: str
    devices: int = 1

    def needed_bytes(self, backward: bool) -> float:
        """Bytes of the program and of the float64 check."""
        s, itemsize = self.task.shape, 8
        checked = len(definitions.rows_of(s)) * s.seq
        logits = checked * itemsize
        if self.by in WHOLE:
            logits = max(logits, 4 * self.task.pattern.pairs(s.seq))
        copies = 6 if backward else 3
        return copies * (s.batch * s.heads * logits + 4 * s.bytes)


def build(entry: Entry, args: Any) -> Program:
    task, backward = entry.task, args.backward
    key = task, args.dtype, args.seed, backward
    if entry.op == "ring_attention":
        return _ring(entry, key)
    if entry.by.startswith("torch"):
        return _torch_program(entry, key)
    fn, inputs = core(entry), definitions.make_arguments(*key)
    if task.module:
        sizes = task.shape, task.module
        make = partial(definitions.make_module, *sizes, fn, args.dtype, args.seed)
        # Its parameters are among the inputs.
        graph = nnx.graphdef(nnx.eval_shape(make))
        fn = partial(_call_module, graph)
    if backward:
        fn = plain.with_gradients(fn)
    check, ours = partial(definitions.check, key), entry.by in IMPLEMENTATIONS
    figures = partial(_mask_figures, task) if isinstance(task.pattern, Blocks) else dict
    return Program(fn, inputs, check, figures=figures, ours=ours)


def _mask_figures(task: Task) -> Row:
    """How long the host takes to make the mask from what it is given."""
    pattern, seq = task.pattern, task.shape.seq
    assert isinstance(pattern, Blocks)
    build = partial(pattern.mask, seq)
    if isinstance(pattern.which, int):
        build = partial(pattern.mask_of_grid, pattern.grid(seq))
    figures = clock(build, lambda mask: None, MASK_BUILDS, "per-call")
    return {"mask_ms": figures["median_ms"]}


def _call_module(graph, query, key, value, state):
    return nnx.merge(graph, state)(query, key, value)


def core(entry: Entry) -> Callable[..., Any]:
    """The attention function of (query, key, value)."""
    pattern, seq, by = entry.task.pattern, entry.task.shape.seq, entry.by
    masked = isinstance(pattern, Blocks)
    options: dict[str, Any] = {} if masked else {"is_causal": pattern.is_causal}
    if by in IMPLEMENTATIONS:
        options["implementation"] = IMPLEMENTATIONS[by]
        if masked:
            options["mask"] = pattern.mask(seq)
        elif entry.op == "dilated_attention":
            lengths, rates = (seq,), (1,)
            if isinstance(pattern, Dilated):
                lengths, rates = pattern.segment_lengths, pattern.dilation_rates
            options["dilation"] = jaxkern.Dilation(lengths, rates)
        return partial(getattr(jaxkern, entry.op), **options)
    if by == PLAIN:
        if isinstance(pattern, Dilated):
            return partial(
                plain.dilated_attention,
                segment_lengths=pattern.segment_lengths,
                dilation_rates=pattern.dilation_rates,
                is_causal=pattern.is_causal,
            )
        return partial(definitions.attend, **options)
    if by == "tokamax":
        tokamax = importlib.import_module("tokamax")
        return partial(tokamax.dot_product_attention, **options)
    options["implementation"] = by.removeprefix("jax.nn ")
    return partial(jax.nn.dot_product_attention, **options)


def _ring(entry: Entry, key: tuple[Any, ...]) -> Program:
    """The tokens lie in the ring's order before the clock starts, as in training."""
    task, count = entry.task, entry.devices
    if len(jax.devices()) < count:
        raise Skip(f"needs {count} devices, there are {len(jax.devices())}")
    is_causal = _is_causal(task)
    layout = "zigzag" if is_causal else "contiguous"
    indices, inverse = jaxkern.ring_permutation(task.shape.seq, count, layout)
    mesh, spec = Mesh(jax.devices()[:count], ("seq",)), P(None, "seq")
    fn = jax.shard_map(
        partial(
            jaxkern.ring_attention, axis_name="seq", is_causal=is_causal, layout=layout
        ),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )

    def place(x):
        return jax.device_put(x[:, indices], NamedSharding(mesh, spec))

    def check(run: Callable[..., Any]) -> Check:
        def whole(*inputs):
            results = run(*map(place, inputs))
            return jax.tree.map(lambda x: np.asarray(x)[:, inverse], results)

        return definitions.check(key, whole)

    inputs = tuple(map(place, definitions.make_arguments(*key)))
    return Program(plain.with_gradients(fn) if key[-1] else fn, inputs, check)


def _torch_program(entry: Entry, key: tuple[Any, ...]) -> Program:
    backward = key[-1]
    framework, module = "torch eager", partial(_sdpa, _is_causal(entry.task))
    if entry.by == FLEX:
        on_cpu = jax.default_backend() != "gpu"
        if backward and on_cpu:
            raise Skip("PyTorch's FlexAttention has no backward on a CPU")
        framework, module = "torch compile", _flex(entry.task, on_cpu)
    inputs = definitions.make_arguments(*key)
    check = partial(definitions.check, key)
    return _torch.program(module, framework, inputs, check, backward)


def _is_causal(task: Task) -> bool:
    return task.pattern == Dense(is_causal=True)


def _sdpa(is_causal, F, *inputs):
    q, k, v = (x.transpose(1, 2) for x in inputs)
    shared = {"enable_gqa": True} if q.shape[1] > k.shape[1] else {}
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, **shared)
    return out.transpose(1, 2)


def _flex(task: Task, on_cpu: bool) -> Callable[..., Any]:
    """FlexAttention over the same lists of blocks, whose names ours share."""
    pattern, seq = task.pattern, task.shape.seq
    assert isinstance(pattern, Blocks)
    torch = importlib.import_module("torch")
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    mask = pattern.mask(seq)
    device = "cpu" if on_cpu else "cuda"
    names = "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"
    arrays = (np.asarray(getattr(mask, name)) for name in names)
    lists = (torch.tensor(array, device=device) for array in arrays)
    mask_mod = {}
    # Blocks of a percentage and near ones are whole.
    if isinstance(pattern.which, str) and pattern.which != "near":
        mask_mod = {"mask_mod": lambda b, h, q, k: pattern.visible(seq, q, k)}
    block_mask = flex.BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=mask.block_size, **mask_mod
    )

    def module(F, *inputs):
        q, k, v = (x.transpose(1, 2) for x in inputs)
        out = flex.flex_attention(q, k, v, block_mask=block_mask)
        return out.transpose(1, 2)

    return module
