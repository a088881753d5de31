"""PyTorch, eager and compiled, on the same inputs and held to the same definition."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from ._harness import Check, Program

FRAMEWORKS = ("torch eager", "torch compile")


def frameworks(wanted: bool) -> tuple[str, ...]:
    return FRAMEWORKS if wanted and why_left_out(wanted) is None else ()


def why_left_out(wanted: bool) -> str | None:
    if not wanted:
        return "--no-peers"
    if importlib.util.find_spec("torch") is None:
        return "it is not installed (pip install torch)"
    return None


def program(
    module: Callable[..., Any],
    framework: str,
    inputs: tuple[Any, ...],
    check: Callable[[Callable[..., Any]], Check],
    backward: bool,
) -> Program:
    """A row of PyTorch; `module` takes torch.nn.functional before its arguments."""
    torch = importlib.import_module("torch")

    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"

    def to_torch(tree):
        def convert(a):
            # By way of float32, since NumPy has no bfloat16 that PyTorch takes.
            wide = torch.from_numpy(np.array(a, np.float32))
            return wide.to(device, getattr(torch, str(a.dtype)))

        return jax.tree.map(convert, tree)

    def forward_and_backward(fn, cotangent, x, *weights):
        leaves, tree = jax.tree.flatten((x, *weights))
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        value = fn(*jax.tree.unflatten(tree, leaves))
        gradients = torch.autograd.grad(value, leaves, cotangent)
        return value, jax.tree.unflatten(tree, gradients)

    def to_numpy(tree):
        return jax.tree.map(lambda t: t.detach().float().cpu().numpy(), tree)

    def make():
        fn = partial(module, torch.nn.functional)
        if framework == "torch compile":
            # Past a few shapes of one function it would quietly stay eager.
            torch.compiler.reset()
            fn = torch.compile(fn, dynamic=False)
        return partial(forward_and_backward, fn) if backward else torch.no_grad()(fn)

    torch.set_float32_matmul_precision("highest")
    return Program(
        make(),
        to_torch(inputs),
        lambda run: check(lambda *args: to_numpy(run(*to_torch(args)))),
        jit=False,
        block=lambda _: torch.cuda.synchronize() if on_gpu else None,
        fresh=make if framework == "torch compile" else None,
        release=torch.cuda.empty_cache,
    )
