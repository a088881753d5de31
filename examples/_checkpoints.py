"""The folder of a training run: its checkpoints, its losses and its settings.

A run that is killed at any time resumes from its folder and ends as if it had not been
killed. `train_lm.py` uses it.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from _program import replacing
from jax.experimental import multihost_utils

KEPT_CHECKPOINTS = 3
# The options that may change when a run is resumed.
HOW = ("folder", "mesh", "distributed", "coordinator", "processes", "process", "plot")


def is_first() -> bool:
    """Tell if this process is the one that prints and that writes losses."""
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


def keep_settings(path: Path, settings: dict[str, str]) -> None:
    """Write the settings of a new run; a resumed run must have the same settings."""
    try:
        old = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        sys.exit(f"{path} cannot be read: {error}")
    changed = [k for k in settings if settings[k] != old.get(k, settings[k])]
    if changed:
        text = ", ".join(f"{k} {old[k]}, now {settings[k]}" for k in changed)
        sys.exit(f"{path.parent} holds a run with other settings: {text}")
    if is_first() and settings != old:
        with replacing(path) as part:
            part.write_text(json.dumps(settings, indent=1) + "\n")


def take(folder: Path) -> TextIO | None:
    """Lock the folder while the returned file is open, or until the process dies."""
    lock = (folder / "lock").open("a+")
    # Windows has no fcntl, and no lock is taken there.
    if importlib.util.find_spec("fcntl") is None:
        return lock
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        sys.exit(f"--folder must be of no other run, got {folder}, held by {holder}")
    except OSError as error:
        say(f"{folder} cannot be locked, so start no second run in it: {error}")
        return lock
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}, since {time.ctime()}")
    lock.flush()
    return lock


class Checkpoints:
    """Checkpoints, losses and settings of a run in its folder; without one, nothing.

    No other run can use the folder until `with` ends.
    """

    def __init__(self, args: argparse.Namespace, text: np.ndarray):
        self.manager, self.lock, self.args = None, None, args
        if args.folder is None:
            return
        settings = {k: str(v) for k, v in sorted(vars(args).items()) if k not in HOW}
        # Without this, a run could resume with another text of the same name.
        settings["text_sha256"] = hashlib.sha256(text).hexdigest()
        folder = args.folder.resolve()
        self.losses = folder / "losses.csv"
        try:
            # A folder that cannot be written to is an error before training starts.
            with to_write():
                folder.mkdir(parents=True, exist_ok=True)
                self.losses.touch()
                self.lock = take(folder) if is_first() else None
                keep_settings(folder / "settings.json", settings)
        except BaseException:
            self.__exit__()
            raise
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT_CHECKPOINTS, enable_async_checkpointing=False
        )
        # Without this, orbax asks the newest checkpoint, which may be damaged.
        handler = ocp.StandardCheckpointHandler()
        self.manager = ocp.CheckpointManager(
            folder / "checkpoints", options=options, item_handlers=handler
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *raised: object) -> None:
        if self.lock is not None:
            self.lock.close()

    def check_room(self, first: int, bytes_each: int) -> None:
        """End the run at once if the disk cannot hold what is still to be saved."""
        if self.manager is None:
            return
        saves = -(-(self.args.steps - first) // self.args.every)
        kept = min(len(self.manager.all_steps()), KEPT_CHECKPOINTS)
        # A checkpoint is written before the oldest one is deleted.
        more = min(saves, KEPT_CHECKPOINTS + 1 - kept)
        free = shutil.disk_usage(self.losses.parent).free
        if free < more * bytes_each:
            sys.exit(
                f"--folder must be on a disk with {more * bytes_each / 1e6:.1f} MB "
                f"free, for {more} checkpoints, got {free / 1e6:.1f} MB"
            )

    def restore(self, state):
        """Return the latest state that can be read, and its step.

        A new run gets the given state and 0. A checkpoint that cannot be read is moved
        aside; if none can be read, the run ends and changes nothing. Checkpoints can be
        read on another mesh.
        """
        if self.manager is None:
            return state, 0
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        steps = sorted(self.manager.all_steps(), reverse=True)
        unreadable = []
        for step in steps:
            try:
                args = ocp.args.StandardRestore(shapes)
                state = self.manager.restore(step, args=args)
            # Whatever is wrong with its files, an older checkpoint may be whole.
            except Exception as error:
                first_line = (str(error).splitlines() or [""])[0]
                say(f"checkpoint {step} cannot be read: {first_line}")
                unreadable.append(step)
                continue
            self._move_aside(unreadable)
            self._keep_losses(step)
            say(f"going on from step {step}")
            return state, step
        if steps:
            sys.exit(f"no checkpoint in {self.manager.directory} can be read")
        self._keep_losses(0)
        return state, 0

    def _move_aside(self, steps: list[int]) -> None:
        """Move checkpoints away, so that later ones can take their places."""
        if self.manager is None or not steps:
            return
        if is_first():
            aside = self.losses.parent / "unreadable"
            aside.mkdir(exist_ok=True)
            for step in steps:
                target = aside / f"{step}-{time.time_ns()}"
                (self.losses.parent / "checkpoints" / str(step)).rename(target)
                say(f"moved to {target}")
        multihost_utils.sync_global_devices("moved aside")
        self.manager.reload()

    def _keep_losses(self, count: int) -> None:
        if not is_first():
            return
        lines = self.losses.read_text().splitlines(keepends=True)
        if len(lines) > count:
            with to_write(), replacing(self.losses) as part:
                part.write_text("".join(lines[:count]))

    def save(self, step: int, state, losses: list[float]) -> None:
        if self.manager is None:
            return
        # Losses come first: a kill in between leaves too many, and a resumed run drops
        # these.
        if is_first():
            with to_write(), self.losses.open("a") as file:
                file.writelines(f"{loss!r}\n" for loss in losses)
                file.flush()
                os.fsync(file.fileno())
        self.manager.save(step, args=ocp.args.StandardSave(state))
