"""How a model's memory is shared on a GPU and beside it: decided before any of it is taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from fomoe_io.backend import Budgets
from fomoe_io.errors import BudgetError, DeviceError
from fomoe_io.experts.lookahead import SLOTS_SHARE, is_guessed, spare_buffers
from fomoe_io.experts.slots import SlotLayout, share_slots, slot_pairs
from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import Share
from fomoe_io.gpu.budget import pool_places, size_classes
from fomoe_io.gpu.device import Gpu
from fomoe_io.gpu.products import SCRATCH_BYTES, TILE_ROWS, WORKSPACE_BYTES, open_blas
from fomoe_io.gpu.recordings import Addresses, ModelSource, Recordings
from fomoe_io.gpu.shared import part_sizes, shared_bytes
from fomoe_io.gpu.weights import kernel_of
from fomoe_io.models.recorder import LAYERS_AHEAD
from fomoe_io.open_model import OpenModel
from fomoe_io.ram_budget import RamBudget, RamPart
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES, round_down, round_up
from fomoe_io.units import format_bytes

FREE_SHARE = 16
"""One part in so many of the device's memory stays free (at most MOST_FREE_BYTES): the driver takes some later."""

MOST_FREE_BYTES = 256 << 20

FREE_UNIT_BYTES = 64 << 20
"""What is free is rounded down to this: it varies from run to run, and the slots should not."""

EXTRA_SPARES = 4
"""Spare buffers beyond a token's picks: victims still on their way down from the layer before."""

WIDE_TOKENS = 2048
"""Of a prompt at once, where there is room: a limited prompt is read four times as fast as by 512."""

WIDE_SHARE = 16
"""And no more than one part in so many of the device's memory goes to that: it would be an expert's."""

VRAM, DRAM = 0, 1


class Sharing:
    """The sizes of everything that a backend will take.

    Parameters
    ----------
    gpus : sequence of Gpu
        All take the same; the one with the least memory says how much.
    opened : OpenModel
    source : ModelSource
    layouts : mapping of int to SlotLayout
        Of the layers' experts in host memory.
    ram : RamBudget or RamPart
        Host memory.

    Attributes
    ----------
    batch_tokens : int
    scratch_bytes : int
        For tiles of the vendor's library of matrix products; 0 without it.
    guesses : int
        Picks of a layer that are guessed.
    staged : int
        Of those, the most that may be read ahead at once.
    sent : int
        And the most that may be sent up ahead.
    is_in_turn : bool
        Whether every layer's next is another device's.
    sketch : Recordings
        The model at no address: it says how much each arena takes.
    vram_pool_bytes : int
        Of the experts on each device.
    budgets : Budgets
        Of all devices together.

    Raises
    ------
    BudgetError
    """

    def __init__(
        self,
        gpus: Sequence[Gpu],
        opened: OpenModel,
        source: ModelSource,
        layouts: Mapping[int, SlotLayout],
        ram: RamBudget | RamPart,
    ) -> None:
        config = opened.config
        self._gpus, self._opened, self._source, self._layouts = gpus, opened, source, layouts
        self._shape, self._config = opened.shape, config
        self._records = {i: record for i, record in source.records.items() if source.part.has(i)}
        self._ram, self._mode, self.is_in_turn = ram, config.lookahead_mode, source.part.is_in_turn
        if self._mode != "auto" or not self._looks_ahead_at_little_cost():
            self._share_with(0 if self._mode == "auto" else source.guesses)

    def _looks_ahead_at_little_cost(self) -> bool:
        """Share with guesses that nobody has asked for: they yield where they are of no use, or room is wanting."""
        with suppress(BudgetError):
            self._share_with(self._source.guesses)
            return self.staged > 0 or self._sends_ahead()
        return False

    def _sends_ahead(self) -> bool:
        """Whether a layer here is guessed, and may have experts in DRAM."""
        in_dram = any(dram for _, dram in self.budgets.slots)
        return in_dram and self.sent > 0 and is_guessed(self._guessing, LAYERS_AHEAD)

    @property
    def _guessing(self) -> Collection[int]:
        """The layers that guess at this device's: its own, or all that it takes turns with."""
        return self._source.records if self.is_in_turn else self._records

    def _share_with(self, guesses: int) -> None:
        self._source, self.guesses = replace(self._source, guesses=guesses), guesses
        self.staged = 0 if self._mode == "auto" else LAYERS_AHEAD * guesses
        self.sent = guesses
        if self._mode == "auto" and guesses:
            self.sent = min(guesses, self._vram_limit() // SLOTS_SHARE // self._class_bytes(VRAM))
        self.batch_tokens = min(self._config.least_batch_tokens, self._opened.context_tokens)
        self.scratch_bytes = self._product_scratch_bytes()
        self.sketch = self.recordings(Addresses())
        if self._config.batch_tokens is None:
            self._widen()
        self.budgets = self._share()

    @property
    def spares(self) -> tuple[int, int]:
        """Buffers in VRAM and in DRAM for experts between two places."""
        return self._shape.used + EXTRA_SPARES + self.sent, 2 * self._shape.used + self.staged

    def recordings(self, addresses: Addresses, context_tokens: int | None = None, device: int = 0) -> Recordings:
        """The model at these addresses, for a token and for batches; `context_tokens`: of another length."""
        product_bytes = WORKSPACE_BYTES + self.scratch_bytes if self.scratch_bytes else 0
        source = replace(self._source, share=Share(device, len(self._gpus)))
        if context_tokens is not None:
            source = replace(source, context_tokens=context_tokens)
        return Recordings(source, self.batch_tokens, product_bytes, addresses)

    def _widen(self) -> None:
        """Batches of WIDE_TOKENS where that takes little."""
        narrow, tokens = self.batch_tokens, min(WIDE_TOKENS, self._opened.context_tokens)
        if tokens == narrow:
            return
        self.batch_tokens = tokens
        wide = self.recordings(Addresses())
        if sum(wide.fixed_bytes) - sum(self.sketch.fixed_bytes) > self._vram_limit() // WIDE_SHARE:
            self.batch_tokens = narrow
        else:
            self.sketch = wide

    def _product_scratch_bytes(self) -> int:
        """Room for the expanded rows of the largest matrix, or for some of them; 0 where the library is not used."""
        if not self._config.tuning.library_products or self.batch_tokens == 1:
            return 0
        try:
            open_blas(self._gpus[0].info.provider)
        except DeviceError:
            return 0
        names = [n for n, t in self._source.resident.items() if kernel_of(int(t.type)) in kernels.EXPANDED_TYPES]
        largest = max((2 * int(np.prod(self._source.resident[n].shape)) for n in names), default=0)
        return min(SCRATCH_BYTES, round_up(largest + 2 * TILE_ROWS * self._shape.columns, LEAST_BLOCK_BYTES))

    def _spare_bytes(self, tier: int) -> int:
        return self.spares[tier] * self._class_bytes(tier)

    def _class_bytes(self, tier: int) -> int:
        return sum(sizes[tier] for sizes in size_classes(self._records))

    def _most_slots(self, share: float, least: int) -> int:
        return max(least, round(share * (self._ram.slots or self._shape.experts)))

    def _vram_limit(self) -> int:
        """Of each device."""
        return min(self._limit_of(gpu, self._source.part.index + i) for i, gpu in enumerate(self._gpus))

    def _free_bytes(self, gpu: Gpu) -> int:
        """What is free, for each of those that are one device."""
        return gpu.free_bytes() // sum(other.info.ordinal == gpu.info.ordinal for other in self._gpus)

    def _limit_of(self, gpu: Gpu, index: int) -> int:
        free, limit = self._free_bytes(gpu), self._config.vram_of(index)
        if limit is None:
            limit = free - min(MOST_FREE_BYTES, gpu.info.memory_bytes // FREE_SHARE)
            return round_down(limit, FREE_UNIT_BYTES) or limit
        if limit > free:
            raise BudgetError(
                f"a device budget of {format_bytes(limit)} is more than the {format_bytes(free)} that are free on "
                f"{gpu.info.name}",
                hint=f"--vram {free >> 20}M, or end what else uses the device",
            )
        return limit

    def _share(self) -> Budgets:
        s, fixed, limit = self._shape, self.sketch.fixed_bytes, self._vram_limit()
        slot_bytes = {i: r.slot_bytes[VRAM] for i, r in self._records.items()}
        most = self._most_slots(self._config.tiers.vram if self._config.tiers else 1.0, s.used)
        taken = sum(fixed) + self._spare_bytes(VRAM) + (self.sketch.exchange_bytes if self._config.peer_memory else 0)
        slots = share_slots(slot_bytes, most, limit - taken, s.used)
        if slots is None:
            raise self._too_small(limit)
        table = np.zeros((s.layers, 2), np.int32)
        for layer, count in slots.items():
            table[layer, VRAM] = count
        devices = len(self._gpus)
        host_bytes = devices * shared_bytes(part_sizes(self.sketch, s, self.batch_tokens))
        if not self._config.peer_memory:
            host_bytes += round_up(self.sketch.exchange_bytes, LEAST_BLOCK_BYTES)
        ram_limit, kept = self._share_host(table, host_bytes)
        pools = [pool_places(self._records, table, self.spares, tier)[2] for tier in (VRAM, DRAM)]
        self.vram_pool_bytes = pools[VRAM]
        return Budgets(
            ram_bytes=ram_limit, vram_bytes=devices * limit, resident_bytes=devices * fixed[0],
            state_bytes=devices * fixed[2], workspace_bytes=devices * fixed[1] + host_bytes,
            vram_pool_bytes=devices * pools[VRAM], pool_bytes=pools[DRAM],
            batch_tokens=self.batch_tokens, slots=slot_pairs(table),
            kept_bytes=kept, lookahead_bytes=self.staged * self._class_bytes(DRAM),
        )  # fmt: skip

    def _too_small(self, limit: int) -> BudgetError:
        """What to ask for instead: more memory where there is some, else the longest context that fits."""
        fixed, context = sum(self.sketch.fixed_bytes), self._opened.context_tokens
        experts = self._shape.used * sum(r.slot_bytes[VRAM] for r in self._records.values()) + self._spare_bytes(VRAM)
        hint = "-b 32 -c 1024, or --device cpu"
        if fixed + experts <= min(map(self._free_bytes, self._gpus)) - (1 << 20):
            hint = f"--vram {-(-(fixed + experts) // (1 << 20)) + 1}M"
        else:
            fitting = context
            while fitting > 256:
                fitting = fitting * 7 // 8 // 256 * 256
                if fitting and experts + sum(self.recordings(Addresses(), fitting).fixed_bytes) <= limit:
                    hint = f"-c {fitting}"
                    break
        return BudgetError(
            f"a device budget of {format_bytes(limit)} is too small for {self._opened.store.model_name} with batches "
            f"of {self.batch_tokens} tokens and a context of {context}",
            hint=hint,
        )

    def _share_host(self, table: np.ndarray, shared: int) -> tuple[int, int]:
        """Fill in the DRAM slots; returns the budget, and what of it is for kept sessions."""
        config, layers = self._config, list(self._records)
        base = self._ram.fixed_bytes + shared + self._spare_bytes(DRAM)
        limit = self._ram.limit(base)
        parts = self.sketch.token.state.parts
        kept = self._ram.kept_bytes(limit - base, limit, parts, self._opened.context_tokens)
        base += kept
        wanted = self._ram.slots or self._shape.experts
        missing = max(0, wanted - int(table[layers, VRAM].min()))
        most = missing if config.tiers is None else min(missing, self._most_slots(config.tiers.dram, 0))
        slot_bytes = {i: layout.slot_bytes for i, layout in self._layouts.items()}
        base += self._stage(table, limit - base, most, most * sum(slot_bytes.values()))
        slots = share_slots(slot_bytes, most, limit - base, 0) if most else {}
        for layer, count in (slots or {}).items():
            table[layer, DRAM] = min(count, max(0, wanted - table[layer, VRAM]))
        if config.slots is not None and (table[layers].sum(1) < wanted).any():
            rest = sum((wanted - table[i, VRAM]) * self._layouts[i].slot_bytes for i in layers)
            raise self._ram.too_small(limit, base + int(rest))
        return limit, kept + (config.cache_bytes or 0)

    def _stage(self, table: np.ndarray, room: int, most: int, most_bytes: int) -> int:
        """Bytes of buffers for guesses that nobody has asked for, of the room that so many DRAM slots would share."""
        if self._mode != "auto":
            return 0
        in_vram = sum(int(table[i, VRAM]) * r.slot_bytes[VRAM] for i, r in self._records.items())
        self.staged = spare_buffers(
            self._mode, self.guesses, self._guessing, self._class_bytes(DRAM), room,
            least=0 if self._config.slots is None else most_bytes, most=most_bytes,
            is_all=most + int(table[list(self._records), VRAM].min()) >= self._shape.experts,
            elsewhere=len(self._gpus) * in_vram, layers_ahead=LAYERS_AHEAD,
        )  # fmt: skip
        return self.staged * self._class_bytes(DRAM)
