"""Runs single tokens on a GPU: a graph that is replayed, a header before it, the experts served beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fomoe_io.gpu import kernels
from fomoe_io.gpu.device import Step

if TYPE_CHECKING:
    from fomoe_io._gpu import DeviceExperts
    from fomoe_io._hip import Graph, Launch
    from fomoe_io.config import EngineConfig
    from fomoe_io.gpu.embedding import EmbeddingReader
    from fomoe_io.gpu.on_device import OnDevice
    from fomoe_io.models.shape import Shape


class _Header:
    """What a device's graph fetches first, in the memory of the host: looked up once, written for each token."""

    def __init__(self, device: OnDevice) -> None:
        h, part = device.recorded.header, device.shared.part
        self.run = part("header", 0, 8).view(np.uint32)
        self.position = part("header", h.positions, 4).view(np.int32)
        self.state = part("header", h.states, 8).view(np.uint64)
        self.embedding = part("header", h.embedding, device.recorded.embedding.row_bytes)


class TokenRunner:
    """The tokens of a backend.

    Parameters
    ----------
    devices : sequence of OnDevice
    experts : DeviceExperts
    embedding : EmbeddingReader
    shape : Shape
    config : EngineConfig

    Attributes
    ----------
    streams : list of Stream
        Of the devices' kernels.
    """

    def __init__(
        self,
        devices: Sequence[OnDevice],
        experts: DeviceExperts,
        embedding: EmbeddingReader,
        shape: Shape,
        config: EngineConfig,
    ) -> None:
        self._devices, self._experts, self._embedding = devices, experts, embedding
        self._shape, self._config = shape, config
        self.streams = [device.gpu.stream for device in devices]
        self._headers = [_Header(device) for device in devices]
        self._rows = self._headers[0].embedding.reshape(1, -1)
        self._logits = devices[0].shared.part("logits", 0, 4 * shape.vocabulary).view(np.float32).reshape(1, -1)
        self._graphs: dict[tuple[int, bool], list[Graph]] = {}

    def all_graphs(self) -> list[Graph]:
        """Those that have been captured."""
        return [graph for graphs in self._graphs.values() for graph in graphs]

    @property
    def branches(self) -> int:
        """Of the graphs."""
        return self._config.tuning.branches or (2 if self._devices[0].gpu.info.provider == "cuda" else 1)

    def graphs(self, outputs: int, looks_ahead: bool = False) -> list[Graph]:
        """The devices' graphs of a token that wants so many logits (0 or 1), and may guess; captured once."""
        if (outputs, looks_ahead) not in self._graphs:
            self._graphs[outputs, looks_ahead] = [self._captured(d, outputs, looks_ahead) for d in self._devices]
        return self._graphs[outputs, looks_ahead]

    def _captured(self, device: OnDevice, outputs: int, looks_ahead: bool) -> Graph:
        gpu, steps = device.gpu, [Step(self._begin_run(device))]
        for s in device.recorded.token.launches(outputs, looks_ahead):
            launch = gpu.prepare(s.kernel, s.grid, *s.arguments)
            steps.append(Step(launch, s.beside and self.branches == 2, s.forks, s.joins))
        return gpu.capture_steps(steps, is_chained=self._config.tuning.chained_launches)

    def _begin_run(self, device: OnDevice) -> Launch:
        """What fetches a token's header and the tables that have changed, before all else."""
        r, s, shared = device.recorded, self._shape, device.shared
        header, changed, tables = (shared.device + shared.offset(n) for n in ("header", "changed", "tables"))
        return device.gpu.prepare(
            "begin_run", kernels.begin_run_grid(r.header.bytes, s.layers), header, r.header_address, changed, tables,
            r.tables_address, r.header.bytes // 16, s.experts,
        )  # fmt: skip

    def _fill_headers(
        self, number: int, ids: np.ndarray, position: int, states: Sequence[int], may_substitute: bool
    ) -> None:
        car = self._config.car
        may_swap = may_substitute and car is not None and position >= car.warmup
        self._embedding.read(ids, self._rows)
        for header, state in zip(self._headers, states, strict=True):
            header.run[:] = number, may_swap
            header.position[0], header.state[0] = position, state
            if header is not self._headers[0]:
                header.embedding[:] = self._rows[0]

    def run(
        self, number: int, ids: np.ndarray, position: int, states: Sequence[int], outputs: int, *,
        may_substitute: bool, looks_ahead: bool, logits_address: int = 0,
    ) -> tuple[int, np.ndarray]:  # fmt: skip
        """Replay a token's graphs.

        Parameters
        ----------
        number : int
            Of the run, never that of the one before: words that wait for a run's are told by it.
        ids : numpy.ndarray
            int32 [1]
        position : int
            In the session.
        states : sequence of int
            Where the session's memory begins on each device.
        outputs : int
            1: with logits; 0: without.
        may_substitute : bool
            Cache-aware routing may act.
        looks_ahead : bool
            Picks are guessed a layer ahead.
        logits_address : int
            Where the host has memory for the logits that the device reaches; 0: they come to the runner's own.

        Returns
        -------
        error : int
            0, or the negative errno of a read.
        logits : numpy.ndarray
            float32 [outputs, vocabulary], valid until the next run: those of the runner.
        """
        graphs = self.graphs(outputs, looks_ahead)
        self._fill_headers(number, ids, position, states, may_substitute)
        error = self._experts.run(self.streams, graphs, number, outputs > 0, logits_address)
        return error, self._logits[:outputs]

    def posted_picks(self) -> np.ndarray:
        """int32 [layers, used]: the router's picks in the last token's run."""
        mail, s, shared = self._devices[0].recorded.mail, self._shape, self._devices[0].shared
        picks = np.full((s.layers, s.used), -1, np.int32)  # what dense layers keep
        for i in s.expert_layers:
            picks[i] = shared.part("mail", mail.post(i) + 8, 8 * s.used).view(np.uint16)[::4]
        return picks
