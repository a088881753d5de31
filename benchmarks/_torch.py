"""Others' libraries: which are there, and PyTorch on the same inputs as ours."""

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ._harness import Check, Program, Row

FRAMEWORKS = ("torch eager", "torch compile")
CUDNN, TOKAMAX, TORCH_SPARSE = "cudnn", "tokamax", "torch 2:4"


def why_left_out(peer: str, args: argparse.Namespace) -> str | None:
    """The reason why a peer has no rows in this run, or None."""
    if not args.peers:
        return "--no-peers"
    library = peer.split()[0]
    if library in ("torch", "tokamax") and not importlib.util.find_spec(library):
        return f"it is not installed (pip install {library})"
    if peer not in (CUDNN, TORCH_SPARSE):
        return None
    if jax.default_backend() != "gpu":
        return "it needs an NVIDIA GPU"
    if args.dtype.itemsize != 2:
        return f"dtype must be bfloat16 or float16, got {args.dtype}"
    trained = peer == TORCH_SPARSE and args.backward
    return "its weights are not trained" if trained else None


def present(peers: Sequence[str], args: argparse.Namespace) -> list[str]:
    return [peer for peer in peers if why_left_out(peer, args) is None]


def left_out(peers: Sequence[str], args: argparse.Namespace) -> dict[str, str]:
    """A line of the header: who is left out, and why."""
    reasons: dict[str, list[str]] = {}
    for peer in peers:
        reason = why_left_out(peer, args)
        if reason:
            reasons.setdefault(reason, []).append(peer)
    lines = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    return {"left out": "\n".join(lines)} if lines else {}


class Peer(NamedTuple):
    """A function of torch tensors in a file of the user's."""

    path: Path
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


def peer(default: str) -> Callable[[str], Peer]:
    """Reads PATH.py[:NAME], for argparse."""

    def read(text: str) -> Peer:
        parts = re.fullmatch(r"(.+\.py)(?::(.*))?", text)
        if parts is None:
            raise argparse.ArgumentTypeError(
                f"must be PATH.py or PATH.py:NAME, got {text!r}"
            )
        path, name = Path(parts[1]), default if parts[2] is None else parts[2]
        if not name.isidentifier():
            raise argparse.ArgumentTypeError(
                f"must name a function after the colon, got {name!r} in {text!r}"
            )
        if not path.is_file():
            raise argparse.ArgumentTypeError(f"there is no file {parts[1]!r}")
        return Peer(path, name)

    return read


@cache
def load(peer: Peer) -> Callable[..., Any]:
    """The peer's function; its file finds what lies beside it, as a script does.

    Raises:
        ImportError: the file cannot be run, or has no such function.
    """
    name = f"_peer_{peer.path.stem}"
    spec = importlib.util.spec_from_file_location(name, peer.path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    folder = str(peer.path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    # Dataclasses and compilers look a function's module up there.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    # A script may also end the program.
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ImportError(f"{peer.path} cannot be imported: {reason}") from error
    function = getattr(module, peer.name, None)
    if not callable(function):
        raise ImportError(f"{peer.path} has no function {peer.name!r}")
    return function


def peak_over_baseline(cuda: Any, call: Callable[[], Any]) -> int:
    """Bytes that a call allocates at most, beside what is allocated before it."""
    # A workspace is allocated once, and belongs to no call.
    call()
    cuda.synchronize()
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    call()
    cuda.synchronize()
    return cuda.max_memory_allocated() - before


def program(
    module: Callable[..., Any],
    framework: str,
    inputs: tuple[Any, ...],
    check: Callable[[Callable[..., Any]], Check],
    backward: bool,
    prepare: Callable[..., tuple[Any, ...]] = lambda to_torch, inputs: to_torch(inputs),
) -> Program:
    """A row of PyTorch; `module` takes torch.nn.functional before its arguments.

    prepare: makes these of the converter and of JAX's, where they are kept otherwise.
    """
    torch, compiles = importlib.import_module("torch"), framework == "torch compile"
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"

    def to_torch(tree):
        def convert(a):
            # By way of float32, since NumPy has no bfloat16 that PyTorch takes.
            wide = torch.from_numpy(np.array(a, np.float32))
            return wide.to(device, getattr(torch, str(a.dtype)))

        return jax.tree.map(convert, tree)

    def record(fn, *args):
        """The result, and the arguments as leaves and a tree."""
        leaves, tree = jax.tree.flatten(args)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        return fn(*jax.tree.unflatten(tree, leaves)), leaves, tree

    def forward_and_backward(fn, cotangent, *args):
        value, leaves, tree = record(fn, *args)
        gradients = torch.autograd.grad(value, leaves, cotangent)
        return value, jax.tree.unflatten(tree, gradients)

    def to_numpy(tree):
        return jax.tree.map(lambda t: t.detach().float().cpu().numpy(), tree)

    def make_function():
        fn = partial(module, torch.nn.functional)
        if not compiles:
            return fn
        # Past a few shapes of one function it would quietly stay eager.
        torch.compiler.reset()
        return torch.compile(fn, dynamic=False)

    def make_run(fn):
        return partial(forward_and_backward, fn) if backward else torch.no_grad()(fn)

    def figures() -> Row:
        if not on_gpu:
            return {}
        # A forward that a backward is to follow: with all that it keeps for it.
        call = partial(run if backward else partial(record, fn), *args)
        return {"allocated_bytes": peak_over_baseline(torch.cuda, call)}

    torch.set_float32_matmul_precision("highest")
    args, fn = prepare(to_torch, inputs), make_function()
    run = make_run(fn)
    return Program(
        run,
        args,
        lambda run: check(lambda *args: to_numpy(run(*prepare(to_torch, args)))),
        jit=False,
        block=lambda _: torch.cuda.synchronize() if on_gpu else None,
        fresh=(lambda: make_run(make_function())) if compiles else None,
        release=torch.cuda.empty_cache,
        figures=figures,
    )
