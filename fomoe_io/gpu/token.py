"""Runs single tokens on a GPU: a graph that is replayed, a header before it, the experts served beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fomoe_io.gpu import kernels
from fomoe_io.gpu.device import Step

if TYPE_CHECKING:
    from fomoe_io._gpu import DeviceExperts
    from fomoe_io._hip import Graph, Launch
    from fomoe_io.config import EngineConfig
    from fomoe_io.gpu.device import Gpu
    from fomoe_io.gpu.embedding import EmbeddingReader
    from fomoe_io.gpu.recordings import Recordings
    from fomoe_io.gpu.shared import SharedWords
    from fomoe_io.models.shape import Shape


class TokenRunner:
    """The tokens of a backend.

    Parameters
    ----------
    gpu : Gpu
    experts : DeviceExperts
    recorded : Recordings
    shared : SharedWords
    embedding : EmbeddingReader
    shape : Shape
    config : EngineConfig
    """

    def __init__(
        self,
        gpu: Gpu,
        experts: DeviceExperts,
        recorded: Recordings,
        shared: SharedWords,
        embedding: EmbeddingReader,
        shape: Shape,
        config: EngineConfig,
    ) -> None:
        self._gpu, self._experts, self._recorded, self._shared = gpu, experts, recorded, shared
        self._embedding, self._shape, self._config = embedding, shape, config
        self.graphs: dict[tuple[int, bool], Graph] = {}

    @property
    def branches(self) -> int:
        """Of the graphs."""
        return self._config.tuning.branches or (2 if self._gpu.info.provider == "cuda" else 1)

    def graph(self, outputs: int, looks_ahead: bool = False) -> Graph:
        """The graph of a token that wants so many logits (0 or 1), and may guess; captured once."""
        if (outputs, looks_ahead) not in self.graphs:
            steps = [Step(self._begin_run())]
            for s in self._recorded.token.launches(outputs, looks_ahead):
                launch = self._gpu.prepare(s.kernel, s.grid, *s.arguments)
                steps.append(Step(launch, s.beside and self.branches == 2, s.forks, s.joins))
            graph = self._gpu.capture_steps(steps, is_chained=self._config.tuning.chained_launches)
            self.graphs[outputs, looks_ahead] = graph
        return self.graphs[outputs, looks_ahead]

    def _begin_run(self) -> Launch:
        """What fetches a token's header and the tables that have changed, before all else."""
        r, s = self._recorded, self._shape
        header, changed, tables = (
            self._shared.device + self._shared.offset(n) for n in ("header", "changed", "tables")
        )
        return self._gpu.prepare(
            "begin_run", kernels.begin_run_grid(r.header.bytes, s.layers), header, r.header_address, changed, tables,
            r.tables_address, r.header.bytes // 16, s.experts,
        )  # fmt: skip

    def _fill_header(self, number: int, ids: np.ndarray, position: int, state: int, may_substitute: bool) -> None:
        h, car = self._recorded.header, self._config.car
        may_swap = may_substitute and car is not None and position >= car.warmup
        self._shared.part("header", 0, 8).view(np.uint32)[:] = number, may_swap
        self._shared.part("header", h.positions, 4).view(np.int32)[0] = position
        self._shared.part("header", h.states, 8).view(np.uint64)[0] = state
        row_bytes = self._recorded.embedding.row_bytes
        self._embedding.read(ids, self._shared.part("header", h.embedding, row_bytes).reshape(1, -1))

    def run(
        self, number: int, ids: np.ndarray, position: int, state: int, outputs: int, *, may_substitute: bool,
        looks_ahead: bool,
    ) -> tuple[int, np.ndarray]:  # fmt: skip
        """Replay a token's graph.

        Parameters
        ----------
        number : int
            Of the run, never that of the one before: words that wait for a run's are told by it.
        ids : numpy.ndarray
            int32 [1]
        position : int
            In the session.
        state : int
            Where the session's memory begins.
        outputs : int
            1: with logits; 0: without.
        may_substitute : bool
            Cache-aware routing may act.
        looks_ahead : bool
            Picks are guessed a layer ahead.

        Returns
        -------
        error : int
            0, or the negative errno of a read.
        logits : numpy.ndarray
            float32 [outputs, vocabulary], valid until the next run.
        """
        s, graph = self._shape, self.graph(outputs, looks_ahead)
        self._fill_header(number, ids, position, state, may_substitute)
        logits_bytes = 4 * s.vocabulary * outputs
        error = self._experts.run(self._gpu.stream, graph, number, logits_bytes)
        return error, self._shared.part("logits", 0, logits_bytes).view(np.float32).reshape(outputs, s.vocabulary)

    def posted_picks(self) -> np.ndarray:
        """int32 [layers, used]: the router's picks in the last token's run."""
        mail, s = self._recorded.mail, self._shape
        picks = np.full((s.layers, s.used), -1, np.int32)  # what dense layers keep
        for i in s.expert_layers:
            picks[i] = self._shared.part("mail", mail.post(i) + 8, 8 * s.used).view(np.uint16)[::4]
        return picks
