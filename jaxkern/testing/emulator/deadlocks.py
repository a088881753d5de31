"""Find deadlocks: barriers at which nobody can arrive any more.

Only threads arrive at barriers. So the threads of a kernel are deadlocked as soon as
every thread that has not ended waits at one. This counts threads and needs no timeout,
which a slow thread or a stopped process would run into.
"""

import contextlib
import threading
from typing import Any

from jax._src import source_info_util
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory

# Seconds after which a waiting thread looks again whether all others wait too.
LOOK_SECONDS = 0.1


class _Threads:
    """Count the threads that have not ended, and those of them that wait."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running = self._waiting = 0

    def count(self, *, running: int = 0, waiting: int = 0) -> None:
        with self._lock:
            self._running += running
            self._waiting += waiting

    def are_stuck(self) -> bool:
        with self._lock:
            return self._waiting >= self._running


threads = _Threads()


class _Condition(threading.Condition):
    """A condition that counts its waiting threads until they are woken."""

    def __init__(self):
        super().__init__()
        self._sleepers = self._calls = 0

    def wait(self, timeout=None):
        del timeout
        calls = self._calls
        self._sleepers += 1
        threads.count(waiting=1)
        while self._calls == calls:
            super().wait(LOOK_SECONDS)
            if self._calls == calls and threads.are_stuck():
                self._sleepers -= 1
                threads.count(waiting=-1)
                raise TimeoutError("DEADLOCK: nobody arrives any more")
        return True

    def notify_all(self):
        threads.count(waiting=-self._sleepers)
        self._calls, self._sleepers = self._calls + 1, 0
        super().notify_all()


_upstream_init = memory.Barrier.__init__
_upstream_wait = memory.Barrier.wait
_upstream_callback = thread_map._thread_map_callback


def barrier_init(self, *args, **kwargs):
    _upstream_init(self, *args, **kwargs)
    self.cv = _Condition()


def barrier_wait(self, thread, logging_info=None):
    try:
        return _upstream_wait(self, thread, logging_info)
    except TimeoutError as error:
        info: Any = getattr(logging_info, "source_info", None)
        where = source_info_util.summarize(info) if info is not None else "?"
        message = f"{error} at the barrier_wait of {where} ({thread})"
        raise TimeoutError(message) from None


def thread_map_callback(jaxpr, token, device_id, num_threads, *args, **options):
    """Count all threads of a block before the first of them starts.

    Without this, a first thread that waits early would seem to be the only one.
    """
    threads.count(running=int(num_threads))
    return _upstream_callback(jaxpr, token, device_id, num_threads, *args, **options)


@contextlib.contextmanager
def counted():
    """Count the calling thread as ended when this context ends."""
    try:
        yield
    finally:
        threads.count(running=-1)
