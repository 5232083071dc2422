"""The bound of the process's memory: what was asked for, or a share of what is available."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fomoe_io.config import EngineConfig
from fomoe_io.errors import BudgetError, UsageError
from fomoe_io.models.shape import Shape
from fomoe_io.system.memory import available_bytes, held_since, process_bytes, rounded_budget
from fomoe_io.units import format_bytes

if TYPE_CHECKING:
    from fomoe_io.backend import StateParts

RESERVE_BYTES = 24 << 20
"""Left free of a budget for what Python still allocates after opening: logits, sampling, prompt history.
Measured on fomoe-run and fomoe-ppl with 8k and 248k vocabularies (tests/engine/test_budget.py holds it)."""

KEPT_BLOCK_TOKENS, KEPT_BUFFER_BYTES = 256, 4 << 20
"""What kept sessions are moved in: a block of KV, and the buffer of a file."""

KEPT_SHARE, MOST_KEPT_BYTES = 16, 2 << 30
"""Kept sessions get one part in so many of the budget, when nothing is said: experts lose a percent of hits by it, and
a prompt that is read a second time costs minutes.  More than the second figure is for the user to say."""

RAM_SHARE = 0.8
"""Of what is available, for an engine that is not told how much it may take."""


def kept_work_bytes(row_bytes: int) -> int:
    """What moving kept sessions takes for a moment."""
    return KEPT_BLOCK_TOKENS * row_bytes + KEPT_BUFFER_BYTES


def least_kept_bytes(row_bytes: int, recurrent_bytes: int) -> int:
    """The least that is of use: a block and a checkpoint."""
    return kept_work_bytes(row_bytes) + KEPT_BLOCK_TOKENS * row_bytes + recurrent_bytes


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
        return self.process_bytes + RESERVE_BYTES + self._logits_bytes + (self._config.cache_bytes or 0)

    def kept_bytes(self, spare_bytes: int, limit: int, parts: StateParts, context_tokens: int) -> int:
        """For kept sessions, beyond what was asked for: a share of the budget, where nothing was.

        Parameters
        ----------
        spare_bytes : int
            Of the budget, when all else has the least that it needs.
        limit : int
            The budget.
        parts : StateParts
        context_tokens : int
        """
        if self._config.cache_bytes is not None:
            return 0
        row, recurrent = parts.row_bytes, parts.recurrent_bytes
        useful = kept_work_bytes(row) + 2 * context_tokens * row + 8 * recurrent
        share = min(limit // KEPT_SHARE, MOST_KEPT_BYTES, spare_bytes // 4, useful)
        return share if share >= least_kept_bytes(row, recurrent) else 0

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


class RamPart:
    """A device's part of a budget, where several share a model.

    Parameters
    ----------
    budget : RamBudget
    limit_bytes : int
        Of the whole process.
    share : float
        This device's of what is not spoken for.
    is_first : bool
        What is spoken for is counted here.
    """

    def __init__(self, budget: RamBudget, limit_bytes: int, share: float, is_first: bool) -> None:
        self._budget, self._limit_bytes, self._share, self._is_first = budget, limit_bytes, share, is_first
        self.slots = budget.slots

    @property
    def fixed_bytes(self) -> int:
        """What is spoken for before the device's host memory."""
        return self._budget.fixed_bytes if self._is_first else 0

    def kept_bytes(self, spare_bytes: int, limit: int, parts: StateParts, context_tokens: int) -> int:
        """As :meth:`RamBudget.kept_bytes`, of what this device keeps of a session."""
        return self._budget.kept_bytes(spare_bytes, limit, parts, context_tokens)

    def limit(self, smallest: int) -> int:
        """The part's bound.

        Raises
        ------
        BudgetError
            It is less than `smallest`.
        """
        limit = self.fixed_bytes + int(self._share * (self._limit_bytes - self._budget.fixed_bytes))
        if limit < smallest:
            raise self.too_small(limit, smallest)
        return limit

    def too_small(self, limit: int, smallest: int) -> BudgetError:
        """The error that names what would do for the whole."""
        whole = self._budget.fixed_bytes + int((smallest - self.fixed_bytes) / self._share)
        return self._budget.too_small(self._limit_bytes, whole)
