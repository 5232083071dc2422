"""The bound of the process's memory: what was asked for, or a share of what is available."""

from __future__ import annotations

from fomoe_io.config import EngineConfig
from fomoe_io.errors import BudgetError, UsageError
from fomoe_io.models.shape import Shape
from fomoe_io.system.memory import available_bytes, held_since, process_bytes, rounded_budget
from fomoe_io.units import format_bytes

RESERVE_BYTES = 24 << 20
"""Left free of a budget for what Python still allocates after opening: logits, sampling, prompt history.
Measured on fomoe-run and fomoe-ppl with 8k and 248k vocabularies (tests/engine/test_budget.py holds it)."""

RAM_SHARE = 0.8
"""Of what is available, for an engine that is not told how much it may take."""


class RamBudget:
    """How much memory an engine may take, and how many experts it is asked to hold.

    Parameters
    ----------
    model_name : str
    shape : Shape
    config : EngineConfig
    peak_bytes_before : int
        The process's peak before anything of the model was read: what it held then and freed is not this engine's.

    Attributes
    ----------
    slots : int or None
        Slots a layer that the configuration asks for.
    process_bytes : int
        What the process holds beside what the engine allocates.

    Raises
    ------
    UsageError
        `config.slots` are more than there are experts, or fewer than a token needs.
    """

    def __init__(self, model_name: str, shape: Shape, config: EngineConfig, peak_bytes_before: int) -> None:
        self._name, self._config, self._peak_bytes_before = model_name, config, peak_bytes_before
        self.slots = config.slots
        if self.slots is not None and not shape.used <= self.slots <= shape.experts:
            raise UsageError(
                f"slots is {self.slots}, and {model_name} uses {shape.used} of {shape.experts} experts a layer",
                hint=f"--slots {min(max(self.slots, shape.used), shape.experts)}",
            )
        self._logits_bytes = 4 * shape.vocabulary * config.logit_rows
        self.process_bytes = process_bytes(shape.vocabulary, shape.layers * shape.experts)

    @property
    def fixed_bytes(self) -> int:
        """What is spoken for before the engine takes anything."""
        return self.process_bytes + RESERVE_BYTES + self._logits_bytes

    def limit(self, smallest: int) -> int:
        """The budget: as configured, or a share of what is available, rounded so that it repeats.

        Raises
        ------
        BudgetError
            It is less than `smallest`, or than what the process holds already.
        """
        limit = self._config.ram_bytes
        if limit is None:
            available = self.process_bytes + int(RAM_SHARE * available_bytes())
            limit = max(rounded_budget(available), min(smallest, available))
        least = max(smallest, held_since(self._peak_bytes_before))
        if limit < least:
            raise self.too_small(limit, least)
        return limit

    def too_small(self, limit: int, smallest: int) -> BudgetError:
        """The error that names what would do."""
        mib = -(-smallest // (1 << 20)) + 1
        what = "" if self.slots is None else f" with {self.slots} slots a layer"
        hint = f"--ram {mib}M" if self.slots is None else f"--ram {mib}M, or fewer --slots"
        error = BudgetError(f"a memory budget of {format_bytes(limit)} is too small for {self._name}{what}", hint=hint)
        error.smallest_bytes = smallest
        return error
