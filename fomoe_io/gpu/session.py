"""A session on a GPU: its state lies in device memory, its tokens are replayed graphs, its prompts run in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fomoe_io.errors import UsageError
from fomoe_io.session import Session

if TYPE_CHECKING:
    from fomoe_io.gpu.engine import DeviceEngine


class DeviceSession(Session):
    """Made by :meth:`DeviceEngine.session`; of the records of :meth:`evaluate` it knows `experts`."""

    def __init__(self, engine: DeviceEngine) -> None:
        self._device_engine = engine
        super().__init__(engine)
        self.reset()

    def _take_memory(self) -> None:
        """The engine's: there is one session."""

    @property
    def _batch_tokens(self) -> int:
        return self._device_engine.batch_tokens

    def _give_memory(self) -> None:
        """Make room for another session."""
        if self._device_engine.live_session is self:
            self._device_engine.live_session = None

    def _clear(self) -> None:
        self._device_engine.clear_state()

    def _run(
        self,
        ids: np.ndarray,
        logits: np.ndarray,
        outputs: int,
        records: dict[str, np.ndarray],
        substitute: bool = False,
    ) -> None:
        engine = self._device_engine
        if set(records) - {"experts"}:
            raise UsageError(f"a GPU records experts alone, not {', '.join(sorted(set(records) - {'experts'}))}")
        self._broken = True
        picks = records.get("experts")
        if substitute or engine.batch_tokens == 1:
            found = engine.run_token(int(ids[0]), self.position, outputs, substitute=substitute)
            logits[:outputs] = found
            if picks is not None:
                picks[:, 0] = engine.posted_picks()
        else:
            engine.run_batch(ids, self.position, logits[:outputs], prompt_tokens=self._prompt_tokens, picks=picks)
        self.position += len(ids)
        self._broken = False
