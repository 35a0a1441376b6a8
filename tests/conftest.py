"""Settings and fixtures of all tests: a strict JAX on several CPU devices, and the reference files beside the checkout."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

# Before JAX starts: several devices, so that nothing may rely on there being one; and most of the time of the tests is
# the compiler's: half as much of it makes programs that run about as fast at these sizes. The same operations are
# computed; the real runs of test_real_data.py take what users have.
DEVICES = "--xla_force_host_platform_device_count=8"
LESS_COMPILING = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # Later ones do not know it, and a flag that XLA does not know ends the process without a word.
    LESS_COMPILING += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), LESS_COMPILING, DEVICES]).strip()

# Programs that several tests compile, in processes of their own too, are compiled once per worker (JAX does not write
# entries atomically); nothing is kept for the next time.
_cache = tempfile.TemporaryDirectory(prefix="e2sad_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import numpy as np
import pytest

from e2sad_jax import data, networks

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes objects by the hundred thousand, and next to none of them is garbage: looking for it was an eighth of the time.
gc.freeze()
gc.set_threshold(100_000)

TESTS = pathlib.Path(__file__).resolve().parent
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


# Begun first, so that none of them is what one worker still has to do when the other has nothing left.
LONG = (
    "test_hosts.py",
    "test_real_data.py",
    "test_experiments.py",
    "test_devices.py",
    "test_population.py",
    "test_runner.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files, within which tests stay as they are, and marks those of tests/slow and tests/ahead."""
    for item in items:
        for folder in ("slow", "ahead"):
            if item.path.is_relative_to(TESTS / folder):
                item.add_marker(folder)
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def shared() -> Callable[[str], pathlib.Path]:
    """Path of a reference file or folder in ../shared; a test that asks for one that is not there is skipped.

    Continuous integration fails on such a skip where the folder exists (`.ci/run`).
    """

    def find(name: str) -> pathlib.Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs ../shared/{name}")
        return path

    return find


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """Optax's Adam mixes float and int32; everything of ours in a training step is held to strict promotion elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def unoptimized() -> Iterator[None]:
    """XLA compiles in a quarter of the time, and convolutions run ten times slower; for programs that run a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def all_unoptimized() -> Iterator[None]:
    """`unoptimized` for all tests of a module, and for what they share."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def little(all_unoptimized: None) -> Iterator[None]:
    """For all tests of a module: `unoptimized`, and `digits_cnn` with so few filters that its slow convolutions are not felt.

    The same layers and code; not for modules that start processes, which have the whole network.
    """
    with pytest.MonkeyPatch.context() as patch:
        narrow = functools.partial(networks.MnistCNN, features=(4, 8), hidden=64)
        patch.setitem(networks.NETWORKS, "digits_cnn", narrow)
        yield


@pytest.fixture(scope="session")
def tiny() -> data.Dataset:
    """Three easily told classes of 50 and 50 images of 8x8: bright rows, bright columns, noise."""
    n, rng = 50, np.random.default_rng(0)
    labels = rng.integers(0, 3, 2 * n).astype(np.int32)
    images = rng.integers(0, 120, (2 * n, 8, 8, 1)).astype(np.uint8)
    images[labels == 1, 2:4] = 250
    images[labels == 2, :, 2:4] = 250
    return data.Dataset("tiny", "", images[:n], labels[:n], images[n:], labels[n:], num_classes=3, source_sha256={})
