"""Evaluate the program of an emulated kernel's thread in NumPy.

JAX's interpret mode turns a thread into a program of callbacks and of the operations
between them. The program runs once or a few times, and compiling it took longer than
all the rest of an emulated kernel. Here each equation is a call of NumPy. JAX computes
what NumPy lacks, one operation at a time.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src import core

Values = Sequence[Any]
# A function from the values of an equation's inputs to the values of its outputs.
Rule = Callable[..., Values]


def evaluate(jaxpr: Any, consts: Values, args: Values) -> Values:
    """Return the results of a jaxpr, and run its callbacks in their order."""
    # A kernel may compute infinities and wrap integers around, without a warning.
    with np.errstate(all="ignore"):
        return _run(jaxpr, consts, args)


def _run(jaxpr, consts, args) -> Values:
    steps, inputs, outputs, blank = _plan(getattr(jaxpr, "jaxpr", jaxpr))
    values = list(blank)
    for place, value in zip(inputs, (*consts, *args), strict=True):
        values[place] = value
    for rule, sources, targets in steps:
        results = rule(*[values[i] for i in sources])
        for place, value in zip(targets, results, strict=True):
            values[place] = value
    return [values[i] for i in outputs]


def _call(jaxpr, *args) -> Values:
    return _run(jaxpr, jaxpr.consts, args)


def forget() -> None:
    """Release the programs that were evaluated."""
    _plan.cache_clear()


# Cached, since the threads of a kernel share a program, and so do a loop's iterations.
@functools.lru_cache(maxsize=4096)
def _plan(jaxpr):
    """Return (steps, inputs, outputs, values) of a program.

    A step is (rule, inputs, outputs). All inputs and outputs are places in the list of
    values, in which only literals are known yet.
    """
    places: dict[Any, int] = {}
    values: list[Any] = []

    def place(variable) -> int:
        known = isinstance(variable, core.Literal)
        if known or variable not in places:
            aval: Any = variable.aval
            number = known and np.asarray(variable.val, aval.dtype)[()]
            values.append(number if known else None)
            places[object() if known else variable] = len(values) - 1
            return len(values) - 1
        return places[variable]

    inputs = [place(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
    steps = [
        (_rule(eqn), [place(v) for v in eqn.invars], [place(v) for v in eqn.outvars])
        for eqn in jaxpr.eqns
    ]
    return steps, inputs, [place(v) for v in jaxpr.outvars], values


def _rule(eqn) -> Rule:
    name = eqn.primitive.name
    if name in STRUCTURED:
        return functools.partial(STRUCTURED[name], **eqn.params)
    if name in ELEMENTWISE:
        one = ELEMENTWISE[name]
    elif name in SHAPING:
        one = functools.partial(SHAPING[name], **eqn.params)
    else:
        return functools.partial(_by_jax, eqn)
    return lambda *args: (one(*args),)


def _by_jax(eqn, *args) -> Values:
    results = eqn.primitive.bind(*args, **eqn.params)
    if not eqn.primitive.multiple_results:
        results = [results]
    return [np.asarray(x) for x in results]


# Rules of control flow, and of operations with several results.


def as_given(x: Any) -> Any:
    """Return a value as callbacks get it: a read-only array, or a Python integer."""
    array = np.asarray(x)
    array.setflags(write=False)
    return array.item() if not array.ndim and array.dtype.kind == "i" else array


def _callback(*args, callback, result_avals, **_) -> Values:
    found = zip(callback(*map(as_given, args)), result_avals, strict=True)
    # Results are copied, since they may be views of memory that changes later.
    return [np.array(x, dtype=aval.dtype)[()] for x, aval in found]


def _while(*args, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr, **_) -> Values:
    count = cond_nconsts + body_nconsts
    of_cond, of_body, carry = (
        args[:cond_nconsts],
        args[cond_nconsts:count],
        args[count:],
    )
    while _call(cond_jaxpr, *of_cond, *carry)[0]:
        carry = _call(body_jaxpr, *of_body, *carry)
    return carry


def _cond(index, *args, branches, **_) -> Values:
    return _call(branches[min(max(int(index), 0), len(branches) - 1)], *args)


def _scan(*args, jaxpr, length, reverse, **params) -> Values:
    if "ft_in" in params:
        n_consts, n_carry, _ = map(len, params["ft_in"].unpack())
    else:
        # Before jax 0.12.
        n_consts, n_carry = params["num_consts"], params["num_carry"]
    end = n_consts + n_carry
    consts, carry, xs = args[:n_consts], args[n_consts:end], args[end:]
    rows = []
    for i in range(length)[:: -1 if reverse else 1]:
        outs = _call(jaxpr, *consts, *carry, *[x[i] for x in xs])
        carry = outs[:n_carry]
        rows.append(outs[n_carry:])
    if not rows:
        avals = jaxpr.out_avals[n_carry:]
        return [*carry, *[np.zeros((0, *aval.shape), aval.dtype) for aval in avals]]
    columns = zip(*rows[:: -1 if reverse else 1], strict=True)
    return [*carry, *[np.stack(column) for column in columns]]


STRUCTURED: dict[str, Rule] = {
    "io_callback": _callback,
    "while": _while,
    "cond": _cond,
    "scan": _scan,
    "jit": lambda *args, jaxpr, **_: _call(jaxpr, *args),
    "closed_call": lambda *args, call_jaxpr, **_: _call(call_jaxpr, *args),
    "custom_jvp_call": lambda *args, call_jaxpr, **_: _call(call_jaxpr, *args),
    "optimization_barrier": lambda *args, **_: args,
}

# Rules of operations with one result that have no options.


def _divide(x, y):
    if jnp.issubdtype(x.dtype, np.integer):
        # Toward zero, as in C.
        return ((x - np.fmod(x, y)) // y).astype(x.dtype)
    return x / y


def _select(which, *cases):
    if which.ndim:
        return (
            np.choose(which, cases) if len(cases) > 2 else np.where(which, *cases[::-1])
        )
    return cases[int(which)]


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _divide,
    "rem": np.fmod,
    "neg": operator.neg,
    "abs": abs,
    "sign": np.sign,
    "max": np.maximum,
    "min": np.minimum,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "select_n": _select,
    "stop_gradient": lambda x: x,
}

# Rules of operations with one result and options.


def _convert(x, *, new_dtype, **_):
    is_rounded = jnp.issubdtype(x.dtype, np.inexact) and not jnp.issubdtype(
        new_dtype, np.inexact
    )
    # NumPy and XLA differ in numbers beyond the range of the integers.
    return (
        np.asarray(jnp.asarray(x).astype(new_dtype))
        if is_rounded
        else x.astype(new_dtype)
    )


def _broadcast(x, *, shape, broadcast_dimensions, **_):
    sizes = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, np.shape(x), strict=True):
        sizes[axis] = size
    return np.broadcast_to(np.reshape(x, sizes), shape)


def _iota(*, dtype, shape, dimension, **_):
    sizes = [-1 if i == dimension else 1 for i in range(len(shape))]
    return np.broadcast_to(
        np.arange(shape[dimension], dtype=dtype).reshape(sizes), shape
    )


def _dynamic_slice(x, *starts, slice_sizes, **_):
    # As in XLA, a part that would reach past the end is moved back to it.
    found = zip(starts, slice_sizes, x.shape, strict=True)
    firsts = [min(max(int(i), 0), size - n) for i, n, size in found]
    return x[tuple(slice(i, i + n) for i, n in zip(firsts, slice_sizes, strict=True))]


def _slice(x, *, start_indices, limit_indices, strides):
    steps = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, steps))]


def _reshape(x, *, new_sizes, dimensions, **_):
    return np.reshape(
        x if dimensions is None else np.transpose(x, dimensions), new_sizes
    )


def _reduce_sum(x, *, axes, **_):
    # XLA adds numbers of 16 bits in float32.
    wide = np.float32 if x.dtype.itemsize == 2 else x.dtype
    return np.sum(x, axes, dtype=wide).astype(x.dtype)


SHAPING: dict[str, Callable[..., Any]] = {
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": lambda x, *, dimensions: np.squeeze(x, dimensions),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "iota": _iota,
    "reduce_sum": _reduce_sum,
    "reduce_max": lambda x, *, axes, **_: np.max(x, axes),
    "integer_pow": lambda x, *, y: x**y,
    "exp": lambda x, **_: np.exp(x),
    "exp2": lambda x, **_: np.exp2(x),
    "log": lambda x, **_: np.log(x),
    "log2": lambda x, **_: np.log2(x),
    "tanh": lambda x, **_: np.tanh(x),
    "sqrt": lambda x, **_: np.sqrt(x),
}
