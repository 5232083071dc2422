"""A batch cut into what a GPU runs at once: single tokens, and prompts of several sessions."""

from __future__ import annotations

from itertools import groupby
from typing import Protocol

import numpy as np

from fomoe_io.backend import Batch, Budgets, Span, together
from fomoe_io.errors import UsageError


class Runner(Protocol):
    """What runs them: one device, or several in turn."""

    @property
    def budgets(self) -> Budgets:
        """`batch_tokens` of them at once; 1: single tokens alone."""

    def uses_products(self, prompt_tokens: int) -> bool:
        """Whether the vendor's library makes the dense products of a prompt of so many tokens."""

    def run_token(self, span: Span, may_substitute: bool, logits: np.ndarray, picks: np.ndarray | None) -> None:
        """One token; logits float32 [outputs, vocabulary] and picks int32 [layers, 1, used], out."""

    def run_prompt(self, spans: list[Span], logits: np.ndarray, uses_products: bool, picks: np.ndarray | None) -> None:
        """Spans of different sessions at once."""


def run_batch(runner: Runner, batch: Batch, logits: np.ndarray) -> None:
    """Read tokens, of as many sessions at once as a batch holds; tokens that may be substituted one by one.

    Raises
    ------
    UsageError
        Something is to be recorded that stays on the device.
    """
    if batch.records.keys() - {"experts"}:
        raise UsageError(f"a GPU records experts alone, not {', '.join(sorted(set(batch.records) - {'experts'}))}")
    place, picks, most = 0, batch.records.get("experts"), runner.budgets.batch_tokens
    if batch.may_substitute or most == 1:
        for span in batch.spans:
            runner.run_token(span, batch.may_substitute, logits[place : place + span.outputs], picks)
            place += span.outputs
        return
    for uses_products, alike in groupby(batch.spans, lambda span: runner.uses_products(span.prompt_tokens)):
        for spans in together(list(alike), most):
            outputs = sum(span.outputs for span in spans)
            runner.run_prompt(spans, logits[place : place + outputs], uses_products, picks)
            place += outputs
