"""The faults that only a kernel's emulation raises."""


class RaceError(AssertionError):
    """Two accesses of memory that nothing orders, one of them a write."""


class DeadlockError(RuntimeError):
    """A barrier at which a thread waits and nobody arrives."""


# Tracebacks name them as users import them.
for _error in (RaceError, DeadlockError):
    _error.__module__ = "jaxkern.testing"
