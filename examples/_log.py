"""The lines that a training run prints and logs.

`log.jsonl` in the run's folder has a line for each step, an object of JSON. With
--tensorboard the same numbers go to TensorBoard. `train_lm.py` uses it.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _program import replacing

Record = dict[str, float]


def is_first() -> bool:
    """Tell if this process is the one that prints and that writes the log."""
    return jax.process_index() == 0


def say(*texts: object, **options: Any) -> None:
    if is_first():
        print(*texts, **options, flush=True)


@contextmanager
def to_write() -> Iterator[None]:
    """End the run with the reason if a file cannot be written to the folder."""
    try:
        yield
    except OSError as error:
        sys.exit(f"--folder must be a folder to write to: {error}")


class Log:
    """The records of the steps, in a file that a resumed run goes on with."""

    def __init__(self, folder: Path, tensorboard: bool):
        self.path, self.writer = folder / "log.jsonl", None
        self.events = folder / "tensorboard" if tensorboard else None
        self.path.touch()

    def begin(self, count: int) -> None:
        """Keep the records of the first `count` steps, and drop later ones."""
        if not is_first():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        if len(lines) > count:
            with to_write(), replacing(self.path) as part:
                part.write_text("".join(lines[:count]))
        if self.events is not None:
            from tensorboardX import SummaryWriter

            # TensorBoard hides what an earlier process wrote from this step on.
            with to_write():
                self.writer = SummaryWriter(str(self.events), purge_step=count + 1)

    def append(self, records: list[Record]) -> None:
        """Write records, which are on the disk when this returns."""
        if not is_first():
            return
        with to_write(), self.path.open("a") as file:
            file.writelines(json.dumps(to_json(record)) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        if self.writer is not None:
            for record in records:
                values = [(k, v) for k, v in record.items() if k != "step"]
                for name, value in values:
                    self.writer.add_scalar(name, value, int(record["step"]))
            self.writer.flush()

    def read(self) -> list[Record]:
        """Return all records; a number that was not finite is NaN."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        nan = math.nan
        return [{k: nan if v is None else v for k, v in x.items()} for x in lines]

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def to_json(record: Record) -> dict[str, float | None]:
    """Replace numbers that are not finite, which JSON does not have, by None."""
    return {k: v if math.isfinite(v) else None for k, v in record.items()}


class Progress:
    """A bar on a terminal, if rich is installed, or else a line for some steps.

    A bar hides the cursor in `with`, and shows it again however that ends.
    """

    def __init__(self, args: argparse.Namespace, first: int):
        self.args, self.bar = args, None
        if is_first() and sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich import progress

            texts = progress.TextColumn(
                "{task.completed}/{task.total} {task.fields[text]}"
            )
            columns = progress.BarColumn(), texts, progress.TimeRemainingColumn()
            self.bar = progress.Progress(*columns)
            self.task = self.bar.add_task(
                "", total=args.steps, completed=first, text=""
            )

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, step: int, records: list[Record]) -> None:
        """Show the step and the means of the records since the last checkpoint."""
        loss = np.mean([record["loss"] for record in records])
        # The mean of rates is harmonic: steps have the same number of tokens.
        slowness = [1 / record["tokens_per_second"] for record in records]
        text = f"loss {loss:.3f}  {1 / np.mean(slowness):.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif step % self.args.every == 0 or step == self.args.steps:
            say(f"step {step:>5}  {text}")
