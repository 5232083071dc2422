"""A prompt's batches, cut so that they can follow one another through several devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event

import numpy as np

from fomoe_io.backend import Span, filled
from fomoe_io.gpu.prompts import Handed

BATCHES_A_DEVICE = 4
"""That are read in one call: of n devices the first and the last wait n - 1 batches of so many times n for the others,
an eighth of the time of two.  More would make progress and checkpoints coarser."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One batch on its way.

    Attributes
    ----------
    spans : list of Span
    logits : numpy.ndarray
        float32 [outputs, vocabulary], out.
    picks : numpy.ndarray or None
        int32 [layers, tokens, used], out.
    handed : Handed
        Rows between the devices.
    place : tuple of int
        Which one it is of how many.
    is_done : list of Event
        For each device.
    """

    spans: list[Span]
    logits: np.ndarray
    picks: np.ndarray | None
    handed: Handed
    place: tuple[int, int]
    is_done: list[Event]


def cut(spans: Sequence[Span], most: int, logits: np.ndarray, picks: np.ndarray | None, devices: int) -> list[Piece]:
    """Batches of up to `most` tokens, full but for the last.

    Parameters
    ----------
    spans : sequence of Span
    most : int
    logits, picks : numpy.ndarray
        See :class:`Piece`; of all of them.
    devices : int
    """
    cuts = filled([len(span.ids) for span in spans], most)
    batches = [[_part(spans[i], first, last) for i, first, last in batch] for batch in cuts]
    pieces, token, row = [], 0, 0
    for number, batch in enumerate(batches):
        tokens, rows = sum(len(span.ids) for span in batch), sum(span.outputs for span in batch)
        mine = None if picks is None else picks[:, token : token + tokens]
        events = [Event() for _ in range(devices)]
        pieces.append(Piece(batch, logits[row : row + rows], mine, {}, (number, len(batches)), events))
        token, row = token + tokens, row + rows
    return pieces


def _part(span: Span, first: int, last: int) -> Span:
    """Tokens of a span; logits are of its last ones."""
    tokens = len(span.ids)
    outputs = max(0, last - max(first, tokens - span.outputs))
    return replace(span, ids=span.ids[first:last], position=span.position + first, outputs=outputs)
