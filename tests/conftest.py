"""What all tests share: caches of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jaxlib.version import __version_info__ as jaxlib_version

# Programs in tests are compiled more often than they are run. Read when JAX starts.
os.environ["XLA_FLAGS"] = " ".join((
    "--xla_backend_optimization_level=0",
    # Twice as fast, where it is known: a flag that isn't ends the process.
    "--xla_cpu_use_fusion_emitters=false" if jaxlib_version < (0, 11) else "",
    os.environ.get("XLA_FLAGS", ""),
))  # fmt: skip

import jax
import pytest
from hypothesis import settings
from jax.experimental import pallas as pl

# The machines that run these tests differ in speed by far; a slow example is no failure.
settings.register_profile("jaxlm", deadline=None)
settings.load_profile("jaxlm")


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that several tests compile are compiled once; other workers and subprocesses find them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = str(shared / "xla")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["NUMBA_CACHE_DIR"] = str(shared / "numba")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.devices()  # JAX starts with one device; an experiment would let it have one for each core


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder for token shards and downloads."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("JAXLM_CACHE", str(folder))
    return folder


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for GPUs run as plain JAX, on whatever device."""
    call = pl.pallas_call

    def interpret(kernel: Any, *, compiler_params: Any, **settings: Any) -> Any:
        return call(kernel, interpret=True, **settings)

    monkeypatch.setattr(pl, "pallas_call", interpret)


# Tracing for coverage makes a test a quarter to a third slower. These are about machine code, which leaves no trace,
# or about modules that other tests go through as well.
UNTRACED = (
    "test_bpe_engine", "test_bpe_split", "test_chaos", "test_compare_tokenizers", "test_dropout", "test_fuzz_benchmark",
    "test_loop", "test_measures", "test_model", "test_moved_runs", "test_page", "test_sampling", "test_speedrun",
    "test_statistics", "test_training",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in UNTRACED:
            item.add_marker("no_cover")
