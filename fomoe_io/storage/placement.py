"""Where the records of a packed store lie: pack writes by this, and a manifest that says otherwise is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fomoe_io.storage.manifest import PAGE_BYTES, page_up

RESIDENT_FILE = 0
"""Of a packed store's files; those of the experts follow, one a target."""

FREQUENCY_DIGITS = 9
"""After the point, in a manifest; the order of a layer's records follows from its frequencies as they are written."""


def written_frequency(frequency: np.ndarray) -> np.ndarray:
    """Picks per token as a manifest holds them."""
    return np.round(frequency, FREQUENCY_DIGITS)


def hottest_first(experts: int, frequency: np.ndarray | None) -> np.ndarray:
    """Expert ids in the order of their records: by frequency, equal ones and those of no profile by id."""
    if frequency is None:
        return np.arange(experts)
    return np.argsort(-written_frequency(frequency), kind="stable")


def turns(weights: Sequence[int]) -> Iterator[int]:
    """Smooth weighted round robin: 3 and 1 give 0, 0, 1, 0 and so on, so every stretch keeps the proportion."""
    credit = [0] * len(weights)
    while True:
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        best = max(range(len(credit)), key=credit.__getitem__)
        credit[best] -= sum(weights)
        yield best


def record_places(
    layers: Sequence[tuple[int, np.ndarray]], weights: Sequence[int]
) -> tuple[list[np.ndarray], list[int]]:
    """Records one after another, the targets taking turns.

    Parameters
    ----------
    layers : sequence of (int, numpy.ndarray)
        Bytes of a record, and expert ids in the order of the records.
    weights : sequence of int
        Records each target gets in turn.

    Returns
    -------
    tuple
        int64 [experts, 2] of each layer, (file, offset) by expert; and the bytes of each target's file.
    """
    ends, turn = [PAGE_BYTES] * len(weights), turns(weights)
    places = []
    for record_bytes, ids in layers:
        place = np.zeros((len(ids), 2), np.int64)
        for expert in ids:
            target = next(turn)
            place[expert] = RESIDENT_FILE + 1 + target, ends[target]
            ends[target] += record_bytes
        places.append(place)
    return places, ends


def resident_places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offsets of tensors of these sizes, each on a page of its own; and the bytes of their file."""
    offsets, end = [], PAGE_BYTES
    for size in sizes:
        offsets.append(end)
        end += page_up(size)
    return offsets, end
