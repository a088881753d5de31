import contextlib
import gc
import os
from pathlib import Path

import pytest
from thorough import THOROUGH, entries_of

# A process that exceeds Linux's 65530 mappings of memory is killed within XLA, which
# has three for each compiled program, and JAX keeps all of these.
MAPPINGS, MANY = Path("/proc/self/maps"), 30_000
SIMPLE = (str, int, float, type(None))
# Of compiled programs that are kept: a run has about 200 MB, and code changes.
MOST_BYTES = 2e9
# Folders or files with tests of what a user runs.
PROGRAMS = ("benchmarks", "examples", "test_docs")
MISSING = pytest.StashKey[list]()


def pytest_configure(config):
    """Set up JAX and Hypothesis where tests run, not where they are handed out."""
    distributes = getattr(config.option, "numprocesses", None)
    if distributes and not hasattr(config, "workerinput"):
        return
    on_cpu = config.option.markexpr != "gpu"
    if on_cpu:
        # Most of the time is compiling. It leaves out LLVM's passes, and none of XLA's:
        # test_suite.py compares the programs. By name, for the processes of tests too.
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        keep_programs(config)
    import jax
    from hypothesis import HealthCheck, settings

    # Compiling a new shape takes longer than any deadline.
    settings.register_profile(
        "jaxkern",
        deadline=None,
        max_examples=30,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("jaxkern")
    if on_cpu:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    # As strict as users may be: nothing of ours promotes or broadcasts unasked.
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def keep_programs(config):
    """Read a program that was compiled before, in this run or the last, from a file.

    Its name is a hash of the program, the options and JAX's version. `pytest
    --cache-clear` removes them.
    """
    if getattr(config, "cache", None) is None:
        return
    folder = config.cache.mkdir("programs")
    if sum(file.stat().st_size for file in folder.iterdir()) > MOST_BYTES:
        for file in folder.iterdir():
            file.unlink(missing_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="module", autouse=True)
def collect_garbage():
    """Of one module: what is imported and cached before need not be looked at again.

    Where programs have become too many they are dropped.
    """
    if MAPPINGS.exists() and len(MAPPINGS.read_bytes().splitlines()) > MANY:
        import jax

        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark what `make test` leaves out, and of benchmarks what the oldest packages do.

    With the oldest packages a benchmark runs its commands only.
    """
    missing = {
        (file, test, case)
        for file, tests in THOROUGH.items()
        for test, cases in tests.items()
        for case in cases or ("",)
    }
    narrowing = "lf", "ignore", "ignore_glob", "deselect"
    narrowed = any(getattr(config.option, name, None) for name in narrowing)
    for item in items:
        file = item.path.relative_to(config.rootpath / "tests").as_posix()
        test, _, case = item.name.partition("[")
        found = entries_of(file, test, case.removesuffix("]"))
        missing -= found
        if found:
            item.add_marker("thorough")
        if item.path.parent.name == "benchmarks" and "command" not in item.name:
            item.add_marker("newest")
    whole = config.args_source is config.ArgsSource.TESTPATHS and not narrowed
    # Of a part of the tests nothing can be said.
    config.stash[MISSING] = sorted(missing) if whole else []


def pytest_make_parametrize_id(val):
    """Names of cases that every process makes alike, as xdist needs them.

    Sizes are (2, 70, 200) -> "2x70x200" and options {"clip": 1} -> "clip=1"; of other
    values pytest makes names, or numbers them.
    """
    if isinstance(val, tuple | list) and val and all(type(x) is int for x in val):
        return "x".join(map(str, val))
    if isinstance(val, dict) and all(isinstance(x, SIMPLE) for x in val.values()):
        return ",".join(f"{key}={value}" for key, value in val.items()) or "no options"
    return None


def pytest_runtest_setup(item):
    import jax

    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU")


@pytest.fixture
def left_out_in_vain(request):
    """What `tests/thorough.py` names in vain."""
    return request.config.stash[MISSING]


@pytest.fixture
def optimized():
    """With LLVM's passes, for a test that computes for longer than it compiles."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def promotion_by_default():
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def promoting():
    """As JAX is by default, for what promotes and broadcasts: optax, flax, peers."""
    with promotion_by_default():
        yield


@pytest.fixture(scope="module", autouse=True)
def run_programs_as_users_do(request):
    """They use optax and others' code, which promotes."""
    programs = {request.path.parent.name, request.path.stem} & {*PROGRAMS}
    with promotion_by_default() if programs else contextlib.nullcontext():
        yield


@pytest.fixture
def unchecked_types():
    """Without the tests' type checker, as users run it: our own errors show."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def interpreted():
    """Mosaic GPU kernels run on the CPU, and their races are errors."""
    from jaxkern.testing import emulate_gpu

    with emulate_gpu():
        yield


@pytest.fixture
def chooses_hopper(monkeypatch):
    """Ops choose as on an H200, of which nothing runs."""
    from jaxkern._core import device

    monkeypatch.setattr(device, "on_hopper", lambda: True)


@pytest.fixture
def hopper(request, monkeypatch):
    """A Hopper GPU: the real one in tests marked `gpu`, else an emulated one.

    The emulated one has two multiprocessors, so that blocks take several tiles.
    """
    from jaxkern._core import device

    if request.node.get_closest_marker("gpu"):
        return
    request.getfixturevalue("interpreted")
    request.getfixturevalue("chooses_hopper")
    monkeypatch.setattr(device, "multiprocessors", lambda: 2)
