"""The folder of a training run: its checkpoints, its log and its settings.

A run that is killed at any time resumes from its folder and ends as if it had not been
killed. `train_lm.py` uses it.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import jax
import orbax.checkpoint as ocp
from _log import Log, Record, is_first, say, to_write
from _options import HOW
from _program import replacing
from jax.experimental import multihost_utils

KEPT_CHECKPOINTS = 3


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
    """Checkpoints, log and settings of a run in its folder; without one, nothing.

    No other run can use the folder until `with` ends. `data` says what the model reads:
    without it, a run could resume with another text of the same name.
    """

    def __init__(self, args: argparse.Namespace, data: dict[str, str]):
        self.manager, self.lock, self.log, self.args = None, None, None, args
        if args.folder is None:
            return
        settings = {k: str(v) for k, v in sorted(vars(args).items()) if k not in HOW}
        settings |= data
        self.folder = folder = args.folder.resolve()
        try:
            # A folder that cannot be written to is an error before training starts.
            with to_write():
                folder.mkdir(parents=True, exist_ok=True)
                self.log = Log(folder, args.tensorboard)
                self.lock = take(folder) if is_first() else None
                keep_settings(folder / "settings.json", settings)
        except BaseException:
            self.__exit__()
            raise
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT_CHECKPOINTS, enable_async_checkpointing=False
        )
        # Without this, orbax asks the newest checkpoint, which may be damaged.
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
        }
        self.manager = ocp.CheckpointManager(
            folder / "checkpoints", options=options, item_handlers=handlers
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *raised: object) -> None:
        if self.log is not None:
            self.log.close()
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
        free = shutil.disk_usage(self.folder).free
        if free < more * bytes_each:
            sys.exit(
                f"--folder must be on a disk with {more * bytes_each / 1e6:.1f} MB "
                f"free, for {more} checkpoints, got {free / 1e6:.1f} MB"
            )

    def restore(self, state) -> tuple[Any, dict[str, Any] | None, int]:
        """Return the latest state that can be read, that of the data, and its step.

        A new run gets the given state, None and 0. A checkpoint that cannot be read is
        moved aside; if none can be read, the run ends and changes nothing. Checkpoints
        can be read on another mesh.
        """
        if self.manager is None or self.log is None:
            return state, None, 0
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        steps = sorted(self.manager.all_steps(), reverse=True)
        unreadable = []
        for step in steps:
            try:
                args = ocp.args.Composite(
                    state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore()
                )
                found = self.manager.restore(step, args=args)
            # Whatever is wrong with its files, an older checkpoint may be whole.
            except Exception as error:
                first_line = (str(error).splitlines() or [""])[0]
                say(f"checkpoint {step} cannot be read: {first_line}")
                unreadable.append(step)
                continue
            self._move_aside(unreadable)
            self.log.begin(step)
            say(f"going on from step {step}")
            return found["state"], found["data"], step
        if steps:
            sys.exit(f"no checkpoint in {self.manager.directory} can be read")
        self.log.begin(0)
        return state, None, 0

    def _move_aside(self, steps: list[int]) -> None:
        """Move checkpoints away, so that later ones can take their places."""
        if self.manager is None or not steps:
            return
        if is_first():
            aside = self.folder / "unreadable"
            aside.mkdir(exist_ok=True)
            for step in steps:
                target = aside / f"{step}-{time.time_ns()}"
                (self.folder / "checkpoints" / str(step)).rename(target)
                say(f"moved to {target}")
        multihost_utils.sync_global_devices("moved aside")
        self.manager.reload()

    def save(
        self, step: int, state: Any, data: dict[str, Any], records: list[Record]
    ) -> None:
        if self.manager is None or self.log is None:
            return
        # The log comes first: a kill in between leaves too many records, and a resumed
        # run drops these.
        self.log.append(records)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
        )
        self.manager.save(step, args=args)
