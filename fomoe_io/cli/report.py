"""What --json writes: the statistics of a run, of one that failed or was cut short, too."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fomoe_io.cli.chat import Answer
from fomoe_io.cli.parser import package_version
from fomoe_io.engine import Engine
from fomoe_io.errors import FomoeError
from fomoe_io.stats import write_json
from fomoe_io.text.sampler import Sampler


class Report:
    """Collects while a run goes on, and is written when it ends, however that is.

    Parameters
    ----------
    target : Path or None
        None writes nothing; `-` is stdout.
    """

    def __init__(self, target: Path | None) -> None:
        self._target = target
        self._values: dict[str, Any] = {"version": package_version()}
        self._answered_tokens = 0
        self.statistics: dict[str, Any] = {}

    def add(self, **values: Any) -> None:
        """More to write."""
        self._values.update(values)

    def answered(self, answer: Answer, sampler: Sampler) -> None:
        """An answer is over, or was cut short."""
        self._answered_tokens += len(answer.ids)
        self.add(
            token_ids=answer.ids,
            text=answer.text,
            stop_reason=answer.stop_reason,
            seed=sampler.seed,
            sampling={**asdict(sampler.config), "seed": sampler.seed},
        )

    def take(self, engine: Engine) -> None:
        """The engine's statistics, before it is closed; and for the last line the tokens that a reader has seen."""
        found = engine.statistics()
        self.add(**found, context_tokens=engine.context_tokens)
        self.statistics = {**found, "answered_tokens": self._answered_tokens, "seed": self._values.get("seed")}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, FomoeError):
            self.add(error={"type": type(error).__name__, "message": error.message, "hint": error.hint})
        elif isinstance(error, KeyboardInterrupt):
            self.add(error={"type": "Interrupted", "message": "the run was interrupted", "hint": None})
        elif error is not None:
            self.add(error={"type": type(error).__name__, "message": str(error), "hint": None})
        if self._target is None:
            return
        if str(self._target) == "-":
            print(json.dumps(self._values, indent=1))
            sys.stdout.flush()
        else:
            write_json(self._target, self._values)
