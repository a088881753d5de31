"""The command-line options of `train_lm.py`."""

import argparse
import importlib.util
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from _documents import find_files
from _program import add_plot, check_plot

# The sizes of a model that is trained from its start. A loaded one has its own.
SIZES = {"embed_dim": 128, "num_layers": 4, "num_heads": 4}
ARCHITECTURE = SIZES | {"mlp": "swiglu"}
LEARNING_RATE, TUNING_RATE = 3e-3, 2e-5
POSITIVE = ("steps", "context_length", "batch", "accumulate", *SIZES, "every")
# The options that may change when a run is resumed.
HOW = ("folder", "mesh", "distributed", "coordinator", "processes", "process", "plot")
HOW += ("tensorboard", "prompt", "save")


def parse(
    argv: Sequence[str] | None, description: str | None, mlps: Iterable[str]
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("the model").add_argument
    help_init = "fine-tune the model of a folder of Hugging Face, with its tokenizer"
    add("--init", type=Path, metavar="FOLDER", help=help_init)
    for name, size in SIZES.items():
        add(flag(name), type=int, help=f"(default: {size})")
    add("--mlp", choices=[*mlps], help="(default: swiglu)")
    add("--compare", action="store_true", help="train one with each --mlp there is")
    help_dtype = "of the computation; weights and optimizer are in float32"
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help=help_dtype)
    add = parser.add_argument_group("the text").add_argument
    help_text = "files, or folders of files, instead of the standard library"
    add("--text", type=Path, nargs="+", metavar="PATH", help=help_text)
    help_data = "array of tokens (.npy) or ArrayRecords of documents, read by grain"
    add("--data", type=Path, nargs="+", metavar="FILE", help=help_data)
    add("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json, for bytes")
    add("--prompt", default="def ", help="what the model writes on from at the end")
    add("--context-length", type=int, default=128, help="tokens of a row")
    add = parser.add_argument_group("the optimizer").add_argument
    add("--steps", type=int, default=400, help="updates of the weights")
    add("--batch", type=int, default=16, help="rows that are computed at once")
    add("--accumulate", type=int, default=1, help="batches of an update")
    help_rate = f"the highest (default: {LEARNING_RATE}; with --init {TUNING_RATE})"
    add("--learning-rate", type=float, metavar="RATE", help=help_rate)
    help_warm_up = "steps in which it rises (default: a twentieth)"
    add("--warm-up", type=int, metavar="STEPS", help=help_warm_up)
    add("--clip", type=float, default=1.0, help="the largest norm of the gradient")
    help_decay = "not of norms, biases and embeddings"
    add("--weight-decay", type=float, default=0.1, help=help_decay)
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("what is kept").add_argument
    add("--folder", type=Path, help="for checkpoints and the log")
    add("--every", type=int, default=50, help="steps from checkpoint to checkpoint")
    help_save = "for the model at the end, in Hugging Face's form"
    add("--save", type=Path, metavar="FOLDER", help=help_save)
    add("--tensorboard", action="store_true", help="log for TensorBoard, too")
    add_plot(parser, "the loss")
    add = parser.add_argument_group("devices").add_argument
    help_mesh = "axes data, fsdp, context, tensor (default: data=all devices)"
    add("--mesh", metavar="AXIS=SIZE,...", help=help_mesh)
    add("--distributed", action="store_true", help="one of several processes")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 is, if not found")
    add("--processes", type=int, metavar="N", help="how many there are, if not found")
    add("--process", type=int, metavar="I", help="which this is, if not found")
    args = parser.parse_args(argv)
    check_model(parser, args)
    check_numbers(parser, args)
    check_processes(parser, args)
    check_files(parser, args)
    check_plot(parser, args.plot)
    return args


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of the other kind of model, and set those that are not given."""
    given = [name for name in ARCHITECTURE if getattr(args, name) is not None]
    if args.init:
        given += ["compare"] * args.compare
        if given:
            name = flag(given[0])
            parser.error(f"--init must be without {name}: the model has its own")
    else:
        for name in ARCHITECTURE.keys() - {*given}:
            setattr(args, name, ARCHITECTURE[name])
    if args.save and (args.compare or args.mlp not in (None, "swiglu")):
        parser.error("--save needs a model of --mlp swiglu, as Hugging Face has it")
    if args.init and not args.tokenizer and (args.init / "tokenizer.json").exists():
        args.tokenizer = args.init / "tokenizer.json"
    if args.learning_rate is None:
        args.learning_rate = TUNING_RATE if args.init else LEARNING_RATE


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse at once what would fail late."""
    for name in POSITIVE:
        least = 2 if name == "context_length" else 1  # one half to write on from
        size = getattr(args, name)
        if size is not None and size < least:
            parser.error(f"{flag(name)} must be at least {least}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")
    if not 0 < args.learning_rate < math.inf:
        rate = args.learning_rate
        parser.error(f"--learning-rate must be positive and finite, got {rate}")
    if args.warm_up is None:
        args.warm_up = max(1, args.steps // 20)
    if not 0 <= args.warm_up < max(2, args.steps):
        parser.error(f"--warm-up must be from 0 to below --steps, got {args.warm_up}")
    if not args.clip > 0:
        parser.error(f"--clip must be positive, or inf for none, got {args.clip}")
    if not 0 <= args.weight_decay < math.inf:
        decay = args.weight_decay
        parser.error(f"--weight-decay must be at least 0 and finite, got {decay}")


def check_processes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    found = args.coordinator, args.processes, args.process
    if not args.distributed and any(x is not None for x in found):
        parser.error("--coordinator, --processes and --process need --distributed")
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    processes = math.inf if args.processes is None else args.processes
    if args.process is not None and not 0 <= args.process < processes:
        parser.error(
            f"--process must be from 0 to one less than --processes, got {args.process}"
        )


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.compare and args.folder:
        parser.error("--compare must be without --folder: it keeps no checkpoints")
    for path in args.text or ():
        files = find_files([path]) if path.exists() else [path]
        for file in files:
            if not (file.is_file() and os.access(file, os.R_OK)):
                parser.error(f"--text must be a file to read, got {str(file)!r}")
        if not files:
            parser.error(f"--text must have a file in it, got {str(path)!r}")
    if args.text and args.data:
        parser.error("--data must be without --text: it is the text")
    suffixes = {path.suffix == ".npy" for path in args.data or ()}
    if len(suffixes) > 1:
        parser.error("--data must be .npy files or ArrayRecords, not both")
    files = [("--data", path) for path in args.data or ()]
    files += [("--tokenizer", args.tokenizer)] if args.tokenizer else []
    for name, path in files:
        if not (path.is_file() and os.access(path, os.R_OK)):
            parser.error(f"{name} must be a file to read, got {str(path)!r}")
    if not args.prompt:
        parser.error("--prompt must not be empty")
    if args.save and args.save.exists() and not args.save.is_dir():
        parser.error(f"--save must be a folder, got {str(args.save)!r}")
    if args.save and (args.save / "config.json").exists():
        parser.error(f"--save must have no model yet, got {str(args.save)!r}")
    needs(parser, "--init", args.init, "safetensors")
    needs(parser, "--save", args.save, "safetensors")
    needs(parser, "--data", args.data, "grain")
    needs(parser, "--tokenizer", args.tokenizer, "tokenizers")
    needs(parser, "--tensorboard", args.tensorboard, "tensorboardX")
    if args.tensorboard and not args.folder:
        parser.error("--tensorboard needs --folder, which it writes to")


def needs(
    parser: argparse.ArgumentParser, name: str, value: object, package: str
) -> None:
    """Refuse an option whose package is not installed."""
    if value and importlib.util.find_spec(package) is None:
        parser.error(f"{name} needs {package}: pip install {package}")
