"""fomoe_io: run Mixture-of-Experts models that are many times larger than memory.

The public names; modules that need the compiled extensions are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fomoe_io.config import EngineConfig, Tiers
from fomoe_io.errors import (
    BudgetError,
    ComputeError,
    DeviceError,
    FomoeError,
    FormatError,
    ReadError,
    StoreError,
    UsageError,
)
from fomoe_io.experts.car import CarRule

if TYPE_CHECKING:
    from fomoe_io.engine import Engine
    from fomoe_io.llm import LLM, Completion
    from fomoe_io.session import Session, Snapshot
    from fomoe_io.storage.store import Store
    from fomoe_io.text.sampler import Sampler, SamplingConfig

    __version__: str

__all__ = [
    "LLM",
    "BudgetError",
    "CarRule",
    "Completion",
    "ComputeError",
    "DeviceError",
    "Engine",
    "EngineConfig",
    "FomoeError",
    "FormatError",
    "ReadError",
    "Sampler",
    "SamplingConfig",
    "Session",
    "Snapshot",
    "Store",
    "StoreError",
    "Tiers",
    "UsageError",
    "__version__",
]

_LAZY = {
    "LLM": "fomoe_io.llm",
    "Completion": "fomoe_io.llm",
    "Engine": "fomoe_io.engine",
    "Sampler": "fomoe_io.text.sampler",
    "SamplingConfig": "fomoe_io.text.sampler",
    "Session": "fomoe_io.session",
    "Snapshot": "fomoe_io.session",
    "Store": "fomoe_io.storage.store",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "__version__":
        metadata = import_module("importlib.metadata")
        try:
            return metadata.version("fomoe_io")
        except metadata.PackageNotFoundError:
            return "unknown (not installed)"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
