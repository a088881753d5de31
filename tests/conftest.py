import contextlib
import gc
import os
from pathlib import Path

import pytest
from thorough import THOROUGH, entries_of

# Linux allows a process 65530 memory mappings. XLA makes three for each compiled
# program, JAX keeps all programs, and a process that exceeds the limit is killed.
MAPPINGS, MANY = Path("/proc/self/maps"), 30_000
SIMPLE = (str, int, float, type(None))
# Bytes of compiled programs in the cache, of which a run of the tests has about 2e8.
MOST_BYTES = 2e9
# Folders and modules whose tests run programs as users do.
PROGRAMS = ("benchmarks", "examples", "test_docs")
MISSING = pytest.StashKey[list]()


def pytest_configure(config):
    """Set up JAX and Hypothesis, but not in the process of xdist that runs no test."""
    distributes = getattr(config.option, "numprocesses", None)
    if distributes and not hasattr(config, "workerinput"):
        return
    on_cpu = config.option.markexpr != "gpu"
    if on_cpu:
        # Tests mostly wait for compilation. This leaves out LLVM's passes and none of
        # XLA's: test_suite.py compares the programs. The environment carries it to the
        # processes that tests start.
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
    # The library must also work for users who forbid implicit promotion.
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def keep_programs(config):
    """Let JAX keep compiled programs in files, for all processes and for later runs.

    The name of a file is a hash of the program, the options and JAX's version. `pytest
    --cache-clear` removes the files.
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
    """Collect garbage before each module, and freeze the objects that are left.

    Later collections need not look at frozen objects. If JAX has too many programs, all
    are dropped.
    """
    if MAPPINGS.exists() and len(MAPPINGS.read_bytes().splitlines()) > MANY:
        import jax

        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the tests that `make test` leaves out, and those for the newest packages.

    With the oldest packages, the commands of benchmarks run and their other tests do
    not.
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
    # In a run of some tests only, an entry may match a test that is not collected.
    config.stash[MISSING] = sorted(missing) if whole else []


def pytest_make_parametrize_id(val):
    """Name a case alike in every process, which xdist needs.

    Sizes (2, 70, 200) become "2x70x200" and options {"clip": 1} become "clip=1"; pytest
    names or numbers all other values.
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
    """The entries of `tests/thorough.py` that match no test."""
    return request.config.stash[MISSING]


@pytest.fixture
def optimized():
    """Compile with LLVM's passes, for a test that computes longer than it compiles."""
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
    """Let JAX promote and broadcast as by default, which optax and flax need."""
    with promotion_by_default():
        yield


@pytest.fixture(scope="module", autouse=True)
def run_programs_as_users_do(request):
    """Let programs promote, because optax and other packages that they use do."""
    programs = {request.path.parent.name, request.path.stem} & {*PROGRAMS}
    with promotion_by_default() if programs else contextlib.nullcontext():
        yield


@pytest.fixture
def unchecked_types():
    """Switch the tests' type checker off, so that the library raises its own errors."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def interpreted():
    """Run Mosaic GPU kernels on the CPU, where their races are errors."""
    from jaxkern.testing import emulate_gpu

    with emulate_gpu():
        yield


@pytest.fixture
def chooses_hopper(monkeypatch):
    """Let ops choose an implementation as on an H200; no kernel can run."""
    from jaxkern._core import device

    monkeypatch.setattr(device, "on_hopper", lambda: True)


@pytest.fixture
def hopper(request, monkeypatch):
    """A Hopper GPU: the real one in tests marked `gpu`, else an emulated one.

    The emulated one has two multiprocessors, so that each block takes several tiles.
    """
    from jaxkern._core import device

    if request.node.get_closest_marker("gpu"):
        return
    request.getfixturevalue("interpreted")
    request.getfixturevalue("chooses_hopper")
    monkeypatch.setattr(device, "multiprocessors", lambda: 2)
