"""`benchmarks.estimators --study`: bias and variance where the gradient is known.

L is a polynomial of six Bernoulli entries, so that the gradient of its mean for their
logits is a sum over 64 outcomes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxkern

from ._figures import Figure, Panel, Point
from ._harness import BACKWARD, PLAIN, XLA, Case, Row, labels
from ._report import Table, grouped, headed, number

ENTRIES, DRAWS = 6, 2**16
SCALES = (0.5, 1.0, 2.0, 4.0)
TEMPERATURES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
# Further than that many standard errors from 0 is no accident of the draws.
ERRORS = 4
LOSSES = ("linear", "quadratic", "quartic")
# The place of an unbiased estimator on a logarithmic axis of percent.
ZERO = 0.3
Loss = Callable[[jax.Array], jax.Array]
Gradient = Callable[[Loss, jax.Array, jax.Array], jax.Array]


def losses(seed: int) -> dict[str, Loss]:
    """Losses by their degree in each entry."""
    keys = jax.random.split(jax.random.key(seed), 3)
    c, w = (jax.random.normal(key, (ENTRIES,)) for key in keys[:2])
    a = jax.random.normal(keys[2], (ENTRIES, ENTRIES))
    of_degree: tuple[Loss, ...] = (
        lambda b: c @ b,
        lambda b: c @ b + b @ a @ b,
        lambda b: (w @ b - 1) ** 4,
    )
    return dict(zip(LOSSES, of_degree, strict=True))


def logits_at(scale: float) -> jax.Array:
    """Logits of both signs, the largest of that size."""
    return scale * jnp.linspace(-1, 1, ENTRIES)


def exact(loss: Loss, logits: jax.Array) -> np.ndarray:
    """The gradient of the mean over all outcomes, in float64."""
    with jax.enable_x64(True):
        outcomes = np.indices((2,) * ENTRIES).reshape(ENTRIES, -1).T.astype(float)

        def mean(logits):
            p = jax.nn.sigmoid(logits)
            chance = jnp.where(outcomes > 0, p, 1 - p).prod(-1)
            return chance @ jax.vmap(loss)(jnp.asarray(outcomes))

        return np.asarray(jax.grad(mean)(jnp.asarray(np.asarray(logits, float))))


def by(estimator: Callable[..., jax.Array], drawn: bool = True) -> Gradient:
    def gradient(loss, logits, key):
        options = {"key": key} if drawn else {}
        return jax.grad(lambda x: loss(estimator(x, **options)))(logits)

    return gradient


def rloo(loss: Loss, logits: jax.Array, key: jax.Array, samples: int = 4) -> jax.Array:
    """The score, times the loss less the mean loss of the other draws.

    No estimator of ours: it needs no derivative of the loss, but several values of it,
    where those give one mask a derivative.
    """
    p = jax.nn.sigmoid(logits)
    b = jax.random.bernoulli(key, p, (samples, *logits.shape)).astype(p.dtype)
    values = jax.vmap(loss)(b)
    others = (values.sum() - values) / (samples - 1)
    return ((values - others) @ (b - p)) / samples


# By op and variant.
GRADIENTS: dict[tuple[str, str], Gradient] = {
    ("straight_through", "one_plus_sigmoid"): by(
        partial(jaxkern.straight_through, derivative="one_plus_sigmoid"), drawn=False
    ),
    ("straight_through", ""): by(jaxkern.straight_through, drawn=False),
    ("straight_through", "drawn"): by(jaxkern.straight_through),
    ("straight_through", "drawn, sigmoid"): by(
        partial(jaxkern.straight_through, derivative="sigmoid")
    ),
    ("reinmax", ""): by(jaxkern.reinmax),
    ("binary_concrete", ""): by(jaxkern.binary_concrete),
    ("rloo", "4 draws"): rloo,
}
TEMPERED: dict[str, Callable[..., jax.Array]] = {
    "reinmax": jaxkern.reinmax,
    "binary_concrete": jaxkern.binary_concrete,
}


def measure(gradient: Gradient, degree: str, scale: float, seed: int) -> Row:
    """Bias and standard deviation over the size of the exact gradient; direction."""
    loss, logits = losses(seed)[degree], logits_at(scale)
    keys = jax.random.split(jax.random.key(seed + 1), DRAWS)
    run = jax.jit(jax.vmap(lambda key: gradient(loss, logits, key)))
    values = np.asarray(run(keys), np.float64)
    truth = exact(loss, logits)
    size = np.linalg.norm(truth)
    std = np.sqrt(values.var(axis=0, ddof=1).sum())
    mean = values.mean(axis=0)
    bias = np.linalg.norm(mean - truth)
    error = std / np.sqrt(DRAWS)
    return {
        "bias": bias / size,
        "std": std / size,
        "bias_error": error / size,
        "cosine": mean @ truth / np.linalg.norm(mean) / size,
        # The sum of float32 numbers is off by some of their last places.
        "unbiased": bool(bias <= ERRORS * error + 1e-5 * size),
    }


def cases(seed: int) -> list[Case]:
    """A row for each loss, size of the logits, estimator and temperature."""
    found = []

    def add(degree, scale, temperature, name, gradient):
        op, variant = name
        who = PLAIN if op == "rloo" else XLA
        sizes = {"loss": degree, "logits": scale, "temperature": temperature}
        what = labels(op, variant, who, BACKWARD, "float32", **sizes)
        found.append(Case(what, partial(measure, gradient, degree, scale, seed)))

    for degree in LOSSES:
        for scale in SCALES:
            for name, gradient in GRADIENTS.items():
                add(degree, scale, 1.0, name, gradient)
        for op, estimator in TEMPERED.items():
            for temperature in TEMPERATURES:
                if temperature == 1 or (op == "reinmax" and temperature < 1):
                    continue
                tempered = by(partial(estimator, temperature=temperature))
                add(degree, 1.0, temperature, (op, ""), tempered)
    return found


def name_of(row: Row) -> str:
    return ", ".join(x for x in (row["op"], row["variant"]) if x)


def tables(rows: Sequence[Row]) -> Iterator[Table | str]:
    at_one = [row for row in rows if row["temperature"] == 1]
    tempered = [r for r in rows if r["op"] in TEMPERED and r["logits"] == 1]
    title = "Bias ± std in % of the exact gradient's size, and cosine with it"
    yield _table(title, at_one, lambda r: f"logits to ±{r['logits']:g}", name_of)
    yield _table(
        "The same by temperature, logits to ±1",
        sorted(tempered, key=lambda r: (r["op"], r["temperature"])),
        name_of,
        lambda r: f"{r['temperature']:g}",
    )
    yield "Without a bias that the draws can show, for any logits at temperature 1:"
    for loss in LOSSES:
        them = "; ".join(unbiased(rows, loss)) or "none"
        yield f"  L {loss} in each entry:\n    {them}."


def _table(title: str, rows: Sequence[Row], head, line) -> Table:
    """A line an estimator or temperature, three cells a loss."""
    lines: list[tuple[str, list[str]]] = []
    for (heading, name), group in grouped(rows, head, line).items():
        found = {row["loss"]: row for row in group if row["status"] == "ok"}
        shown = name.replace("straight_through, ", "  ")
        cells = [cell for loss in LOSSES for cell in _cells(found.get(loss))]
        lines.append((heading, [shown, *cells]))
    short = ("linear", "quadr.", "quart.")
    columns = [c for name in short for c in (name, "±", "cos")]
    return Table(title, ["", *columns], headed(lines))


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return ["-"] * 3
    bias = 0 if row["unbiased"] else row["bias"]
    shown = ["0" if not x else number(100 * x, 2) for x in (bias, row["std"])]
    return [*shown, f"{row['cosine']:.2f}"]


def unbiased(rows: Sequence[Row], loss: str) -> list[str]:
    """The estimators without a bias for any logits, at temperature 1."""
    chosen = [r for r in rows if r["loss"] == loss and r["temperature"] == 1]
    groups = grouped((r for r in chosen if r["status"] == "ok"), name_of).items()
    return [name for (name,), group in groups if all(r["unbiased"] for r in group)]


def figure(rows: Sequence[Row]) -> Figure | None:
    """Bias above and deviation below, over the logits' size; a column a loss."""
    rows = [r for r in rows if r["status"] == "ok" and r["temperature"] == 1]
    if not rows:
        return None

    def point(row: Row, what: str) -> Point:
        value = 0 if what == "bias" and row["unbiased"] else row[what]
        return Point(row["logits"], max(100 * value, ZERO))

    grid = []
    for what, words in (("bias", "bias"), ("std", "standard deviation")):
        line = []
        for (loss,), group in grouped(rows, "loss").items():
            series = {
                name: [point(row, what) for row in of_name]
                for (name,), of_name in grouped(group, name_of).items()
            }
            title = f"L {loss} in each entry"
            x, y = "logits up to ± (log scale)", f"{words}, % (log scale)"
            line.append(Panel(title, x, y, series, log_x=True, log_y=True))
        grid.append(line)
    text = f"{DRAWS} draws; {ZERO} % stands for 0 and below"
    return Figure(grid, text)
