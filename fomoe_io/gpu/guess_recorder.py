"""Lookahead on a GPU: the launches that guess what a layer will pick before its turn has come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fomoe_io.gpu import launches as make
from fomoe_io.gpu.arena import F32, Q8, DeviceMatrix, DeviceRows, Memory
from fomoe_io.gpu.recorder import DeviceRecorder
from fomoe_io.models.recorder import Picks, Router


class GuessRecorder(DeviceRecorder):
    """Of one token, whose graph may look ahead.

    Parameters
    ----------
    guesses : int
        How many of a layer's picks are guessed; 0: none.
    memory, settings
        See :class:`DeviceRecorder`.
    """

    def __init__(self, memory: Memory, *, guesses: int = 0, **settings: Any) -> None:
        super().__init__(memory, **settings)
        self._guesses = guesses

    def lookahead(
        self, layer: int, ahead: int, x: DeviceRows, weight: int, epsilon: float, matrix: DeviceMatrix,
        router: Router[int],
    ) -> None:  # fmt: skip
        """Norm and router of a layer that follows, on what this one's experts will be added to.

        By the device that computes both; where devices take turns, by the following layer's, which has nothing to do.
        """
        part, step = self._part, (weight, epsilon, matrix, router)
        if not self._guesses:
            return
        if part.is_in_turn and ahead == 1:
            if self._is_here:
                with self._guessing():
                    self._hand_early(x)
            elif part.has(layer):
                self._guess_early(layer, x.columns, *step)
        elif self._is_here and part.has(layer):
            own = sum(part.has(i) for i in range(layer - ahead + 1, layer + 1))  # how many of this device's ahead
            with self._guessing():
                self._guess(layer, own - 1 + part.is_in_turn, x, *step)

    @contextmanager
    def _guessing(self) -> Iterator[None]:
        """What is recorded inside is part of the graph that looks ahead alone."""
        first = len(self.body)
        yield
        for spec in self.body[first:]:
            spec.guesses = True

    def _guess_early(self, layer: int, columns: int, *step: Any) -> None:
        """Between two layers of this device."""
        self._is_here, row = True, self.rows("guess_x", columns)
        with self._guessing():
            self._take_early(row)
            self._guess(layer, 0, row, *step)
        self._is_here = False

    def _guess(
        self, layer: int, before: int, x: DeviceRows, weight: int, epsilon: float, matrix: DeviceMatrix,
        router: Router[int],
    ) -> None:  # fmt: skip
        guessed = replace(router, used=self._guesses)
        row = self.rows("guess_normed", x.columns, self.form_of(matrix))
        floats, q8 = (row.address if row.type == form else None for form in (F32, Q8))
        self._add("rms_norm", (self.tokens, 1, 1), x.address, None, weight, floats, q8, x.columns, epsilon)
        logits = self.rows("guess_logits", router.experts)
        self.body.append(make.mat_vec(make.Product(matrix, row.address, logits.address)))
        ids, weights = (self.rows(f"guess_{name}", self._guesses) for name in ("experts", "weights"))
        chosen_by, e, run = self._chosen_by(router, "guess_chosen_by"), self._experts[layer], self._mailbox.run
        post = e.guess[before]
        self.body.append(make.route(Picks(layer, guessed, logits, ids, weights), self.tokens, chosen_by))
        if self._substitutes:
            values, p, *more = self._rule_of(guessed, logits, chosen_by)
            posted = (ids.address, weights.address, e.table, post, run)
            self._add("substitute_and_post", (1, 1, 1), values, p, *posted, *more)
        else:
            self._add("post_guesses", (1, 1, 1), ids.address, post, run, self._guesses)
