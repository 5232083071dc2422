"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


MOST_WORKERS = 8

if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    # the commands that tests start, dozens of them, need not compile the package each for itself
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / "build" / "tests" / "bytecode"))


def pytest_configure(config: pytest.Config) -> None:
    """A worker keeps to its share of the processors: threads of two engines that spin for each other take turns."""
    worker = getattr(config, "workerinput", None)
    processors = sorted(os.sched_getaffinity(0))
    if worker and len(processors) >= worker["workercount"]:
        first = int(worker["workerid"].removeprefix("gw")) % worker["workercount"]  # one that died is replaced
        os.sched_setaffinity(0, processors[first :: worker["workercount"]])


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Whole folders are tested by a process for each processor; what is named, and what needs a device, by one."""
    named = any(Path(argument.partition("::")[0]).suffix == ".py" for argument in config.args)
    alone = any(mark in config.option.markexpr.replace(f"not {mark}", "") for mark in ("gpu", "bench", "slow"))
    processors = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    return 0 if named or alone or processors == 1 else processors


@pytest.fixture(autouse=True)
def _cache_of_its_own(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test learns from another's profile, or leaves one in the user's cache.  Kernels for a real GPU stay cached."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The small trained model that ships with the project."""
    return ROOT / "models" / "fomoe-demo-32x8.Q4_K_M.gguf"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference vectors and larger models, which lie beside the checkout and are not part of it."""
    path = ROOT.parent / "shared"
    if not (path / "reference").is_dir():
        pytest.skip("the reference data (../shared) is not here")
    return path
