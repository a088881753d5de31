import pytest


def pytest_configure(config):
    """Set up JAX and Hypothesis where tests run, not where they are handed out."""
    distributes = getattr(config.option, "numprocesses", None)
    if distributes and not hasattr(config, "workerinput"):
        return
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
    if config.option.markexpr != "gpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)


def pytest_runtest_setup(item):
    import jax

    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU")


@pytest.fixture
def unchecked_types():
    """Without the tests' type checker, as users run it: our own errors show."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def interpreted():
    """Mosaic GPU kernels run on the CPU, and their races are errors."""
    from mgpu_interpret import interpret

    with interpret():
        yield


@pytest.fixture(scope="module")
def compile_fast():
    """For many small programs over many devices: they run slower, which is nothing."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)
