"""Are low-rank and 2:4-sparse MLPs faster than the full-rank SwiGLU, and right?

    python -m benchmarks.mlp            60M, 130M, 350M at 1 x 512 tokens;
                                        on a GPU every model at 1 and 32 x 512
    python -m benchmarks.mlp --full     8 models x 5 batches x every variant

The published study (PyTorch, RTX 3090, bfloat16) compares the four first variants; its
2:4 is the static mask. Beyond it: 2:4 chosen per token, weights pruned to 2:4, and the
selection alone.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial

import jax

from . import _mlp_model as shapes
from . import _mlp_programs as programs
from . import _report as report
from . import _torch, frame
from ._cli import names, run_program
from ._figures import Figure, Panel, Point
from ._h200 import percent_of_floor
from ._harness import BOTH, FORWARD, KERNEL, PLAIN, XLA, Case, Row, labels, name_of
from ._mlp_model import BATCHES, MODELS, Model
from ._mlp_programs import IMPLEMENTATIONS
from ._torch import TOKAMAX, TORCH_SPARSE

CPU_ITERATIONS = 40
CASES = [(model, batch) for model in MODELS for batch in BATCHES]
CPU_CASES = [(model, 1) for model in ("60M", "130M", "350M")]
GPU_CASES = [(model, batch) for model in MODELS for batch in (1, 32)]
PEERS = TOKAMAX, *_torch.FRAMEWORKS, TORCH_SPARSE
COMPUTERS = XLA, KERNEL, PLAIN, *PEERS
DISPLAY = {
    "swiglu": "SwiGLU",
    "low_rank_swiglu": "low-rank SwiGLU",
    "low_rank_relu2": "low-rank ReLU²",
    "low_rank_relu2 2:4-static": "  with 2:4-static",
    "low_rank_relu2 2:4": "  with 2:4",
    "low_rank_relu2 2:4-soft": "  with 2:4-soft",
    "low_rank_relu2 pruned": "  pruned",
    "sparsify_2_4 static": "static mask alone",
    "sparsify_2_4 top2": "2:4 alone",
    "sparsify_2_4 soft": "2:4-soft alone",
}
# Columns of the tables of quotients: whose time, over whose.
SPEED_UPS = {
    "low-rank SwiGLU": ("swiglu", "low_rank_swiglu"),
    "ReLU²": ("swiglu", "low_rank_relu2"),
    "2:4-static": ("swiglu", "low_rank_relu2 2:4-static"),
    "2:4": ("swiglu", "low_rank_relu2 2:4"),
    "2:4-soft": ("swiglu", "low_rank_relu2 2:4-soft"),
}
OF_2_4 = {
    "static, over ReLU²": ("low_rank_relu2", "low_rank_relu2 2:4-static"),
    "static, over SwiGLU": ("low_rank_swiglu", "low_rank_relu2 2:4-static"),
    "2:4, over ReLU²": ("low_rank_relu2", "low_rank_relu2 2:4"),
}


@cache
def published_ms() -> Mapping[tuple[str, int, str], float]:
    """Milliseconds by model, batch and variant; the mask's own as one more variant."""
    figures = {}
    for line in report.published("mlp"):
        key = line["model"], int(line["batch_size"])
        figures[*key, line["variant"]] = float(line["time_ms"])
        if line["mask_time_ms"]:
            figures[*key, "sparsify_2_4 static"] = float(line["mask_time_ms"])
    return figures


def make_cases(args: argparse.Namespace) -> list[Case]:
    default = GPU_CASES if args.on_device else CPU_CASES
    wanted = CASES if args.full else default
    if args.models or args.batches:
        models = args.models or list(dict.fromkeys(model for model, _ in wanted))
        batches = args.batches or sorted({str(batch) for _, batch in wanted}, key=int)
        wanted = [(model, int(batch)) for model in models for batch in batches]
    return [
        _make_case(model, batch, name, by, args)
        for model, batch in wanted
        for by in COMPUTERS
        for name in IMPLEMENTATIONS
        if by in programs.computers(name, args)
    ]


def _make_case(label: str, batch: int, name: str, by: str, args) -> Case:
    model, impl = shapes.MODELS[label], IMPLEMENTATIONS[name]
    tokens, which = batch * shapes.SEQ, BOTH if args.backward else FORWARD
    op, _, variant = name.partition(" ")
    theirs = None
    if by == XLA and not args.backward:
        theirs = published_ms().get((label, batch, impl.published or name))
    sizes = {"model": label, "batch": batch, "tokens": tokens}
    shape = {"shape": f"{label} {batch}x{shapes.SEQ}"}
    return Case(
        labels=labels(op, variant, by, which, args.dtype, **shape, **sizes),
        build=partial(programs.build, name, model, tokens, args, by),
        flops=(3 if args.backward else 1) * shapes.count_flops(model, tokens, name),
        iterations=model.iterations if args.on_device else CPU_ITERATIONS,
        needed_bytes=_needed_bytes(model, tokens, impl.weights, args),
        published_ms=theirs,
    )


def _needed_bytes(model: Model, tokens: int, kind: str, args) -> float:
    """Bytes of arguments, gradients and intermediates, and of the float64 check."""
    sizes = programs.weight_shapes(model, kind)
    sizes = jax.tree.leaves(sizes, is_leaf=programs.is_shape)
    parameters = sum(a * b for a, b in sizes)
    copies = 2 if args.backward else 1
    features = 4 * tokens * (2 * model.hidden + 4 * model.relu2)
    in_dtype = parameters * args.dtype.itemsize + features
    checked = min(tokens, programs.CHUNK) * 6 * model.relu2 + parameters
    return copies * (in_dtype + 8 * checked)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    valid = ", ".join(MODELS)
    add("--models", type=names(list(MODELS)), metavar="A,B", help=f"of {valid}")
    valid = ", ".join(map(str, BATCHES))
    help_batches = f"of {valid} (x {shapes.SEQ})"
    add("--batches", type=names(BATCHES), metavar="A,B", help=help_batches)
    add("--backward", action="store_true", help="forward and all gradients")


def notes(args: argparse.Namespace) -> dict[str, str]:
    lines = {
        "published": "PyTorch, RTX 3090, bfloat16; the 2:4 there is the static mask"
    }
    if args.on_device:
        lines["floor"] = "of one H200 by its data sheet, in 16 bits; of device time"
    return lines | _torch.left_out(PEERS, args)


def tables(rows: Sequence[Row], meta: frame.Meta) -> Iterator[report.Table]:
    columns = {"ms": report.time, "± std": report.field("std_ms", 2)}
    percent = ""
    if report.on_gpu(rows):
        percent = "; device: of the kernels alone; peak, floor in %"
        columns |= {"device": report.field("device_ms")} | report.rate(rows)
        columns["peak"] = report.field("percent_of_peak")
        columns["floor"] = lambda row: report.number(percent_of_floor(row))
    else:
        columns |= report.rate(rows) | {"MB": report.field("temp_bytes", scale=1e-6)}
        columns["comp. s"] = report.field("compile_s", 2)
    yield report.listing(
        f"Milliseconds of {rows[0]['pass']}: median, spread and published{percent}",
        rows,
        lambda row: DISPLAY[name_of(row)],
        columns | {"publ.": report.field("published_ms")},
        lambda row: f"{row['shape']} {row['by']}",
    )
    ours = [row for row in rows if row["by"] in (XLA, KERNEL) and report.steady(row)]
    if ours:
        yield from _quotients("Speed-up over full-rank SwiGLU", ours, SPEED_UPS)
        title = "Speed-up of 2:4 over low-rank ReLU² and SwiGLU"
        yield from _quotients(title, ours, OF_2_4)


def _times(rows: Sequence[Row], key: str) -> dict[str, float]:
    return {name_of(row): row[key] for row in rows if row[key]}


def _quotient(times: Mapping[str, float], pair: tuple[str, str]) -> float | None:
    return report.over(*(times.get(name) for name in pair))


def _quotients(
    title: str, rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]
) -> Iterator[report.Table]:
    """A table, unless no shape has both rows of a quotient."""
    lines = []
    for (shape, by), group in report.grouped(rows, "shape", "by").items():
        ours, theirs = _times(group, "time_ms"), _times(group, "published_ms")
        cells = [
            report.ratio(_quotient(ours, pair), _quotient(theirs, pair))
            for pair in columns.values()
        ]
        if set(cells) != {"-"}:
            lines.append([shape if by == XLA else f"{shape} kernels", *cells])
    more = " (published)" if any(row["published_ms"] for row in rows) else ""
    if lines:
        yield report.Table(f"{title}{more}", ["", *columns], lines)


def figure(rows: Sequence[Row], meta: frame.Meta) -> Figure | None:
    """Speed-up over full rank by model, a panel a batch."""
    ours = [row for row in rows if row["by"] == XLA and report.steady(row)]
    panels = []
    for (batch,), group in sorted(report.grouped(ours, "batch").items()):
        models = report.grouped(group, "model")
        found: dict[str, dict[str, list[Point]]] = {"time_ms": {}, "published_ms": {}}
        for x, of_model in enumerate(models.values()):
            for key, points in found.items():
                times = _times(of_model, key)
                for name, pair in SPEED_UPS.items():
                    quotient = _quotient(times, pair)
                    if quotient is None:
                        continue
                    spread = None
                    if key == "time_ms":
                        spread = quotient * _relative_spread(of_model, pair)
                    points.setdefault(name, []).append(Point(x, quotient, spread))
        if found["time_ms"]:
            panels.append(
                Panel(
                    f"{batch} x {shapes.SEQ} tokens, {group[0]['pass']}",
                    "model",
                    "speed-up over full-rank SwiGLU",
                    found["time_ms"],
                    names=[model for (model,) in models],
                    outlined=found["published_ms"],
                    limits=[Point(x, 1) for x in range(len(models))],
                )
            )
    if not panels:
        return None
    return Figure(
        [[panel] for panel in panels],
        outlined="published (RTX 3090, bfloat16)",
        limits="as fast as full rank",
    )


def _relative_spread(rows: Sequence[Row], pair: tuple[str, str]) -> float:
    """The standard deviation of a quotient of two times, over the quotient."""
    by_name = {name_of(row): row for row in rows}
    parts = ((by_name[n]["std_ms"] or 0) / by_name[n]["time_ms"] for n in pair)
    return sum(part**2 for part in parts) ** 0.5


BENCHMARK = frame.Benchmark(
    name="mlp",
    question=__doc__ or "",
    cases=make_cases,
    tables=tables,
    describe=("shape", "by", "op", "variant"),
    options=add_options,
    notes=notes,
    figure=figure,
)
main = partial(frame.main, BENCHMARK)


if __name__ == "__main__":
    run_program(main)
