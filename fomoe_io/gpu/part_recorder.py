"""Launches of the layers that a device computes, and where a layer of another follows one of this one's."""

from __future__ import annotations

from typing import Any

from fomoe_io.gpu.arena import DeviceRows, DeviceState, LaunchSpec, Mailbox, Part


class PartRecorder:
    """What is recorded of other devices' layers is dropped.

    Parameters
    ----------
    state : DeviceState
        A session's memory.
    mailbox : Mailbox
    part : Part
        What this device computes of the model.
    """

    def __init__(self, state: DeviceState, mailbox: Mailbox, part: Part) -> None:
        self.state, self._mailbox, self._part = state, mailbox, part
        self._body: list[Any] = []
        self._elsewhere: tuple[list[Any], DeviceState] = [], DeviceState(0)
        self._is_here, self._hops = part.has(0), 0
        self._pending: dict[int, int] = {}  # rows' address -> address of what is to be added to them

    @property
    def body(self) -> list[Any]:
        """All but the logits; of a layer that another device computes, a list that nobody reads."""
        return self._body if self._is_here else self._elsewhere[0]

    @property
    def _kept(self) -> DeviceState:
        return self.state if self._is_here else self._elsewhere[1]

    def _add(self, kernel: str, grid: tuple[int, int, int], *arguments: Any) -> LaunchSpec:
        spec = LaunchSpec(kernel, grid, list(arguments))
        self.body.append(spec)
        return spec

    def layer_end(self, layer: int, x: DeviceRows) -> None:
        """The next layer may be another device's.  Layer outputs are recorded on the CPU alone."""
        part = self._part
        if not part.owner or layer + 1 == len(part.owner) or part.owner[layer] == part.owner[layer + 1]:
            return
        added = self._pending.get(x.address)
        if part.has(layer):
            self._hand_over(self._hops, x, added)
        self._is_here = part.has(layer + 1)
        if self._is_here:
            self._take_over(self._hops, x, added)
        self._hops += 1

    def _hand_over(self, hop: int, x: DeviceRows, added: int | None) -> None:
        """The residual stream, and what the next norm will add to it."""
        rows, flag, _ = self._part.hop(hop)
        self._add("hand_over", (1, 1, 1), x.address, added, rows, flag, self._mailbox.run, x.columns)

    def _take_over(self, hop: int, x: DeviceRows, added: int | None) -> None:
        rows, flag, _ = self._part.hop(hop)
        mail = self._mailbox
        self._add("take_over", (1, 1, 1), x.address, added, rows, flag, mail.run, mail.stop, x.columns)

    def _hand_early(self, x: DeviceRows) -> None:
        """What the next layer's device guesses by, while this one's experts are computed."""
        rows, _, early = self._part.hop(self._hops)
        self._add("hand_over", (1, 1, 1), x.address, None, rows, early, self._mailbox.run, x.columns)

    def _take_early(self, x: DeviceRows) -> None:
        rows, flag, early = self._part.hop(self._hops)
        mail = self._mailbox
        self._add("take_early", (1, 1, 1), x.address, rows, early, flag, mail.run, mail.stop, x.columns)

    @property
    def makes_logits(self) -> bool:
        """Whether the model ends on this device."""
        return self._part.is_last
