"""Which experts an engine begins with: those that a profile calls hottest, or all when all fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fomoe_io.experts.slots import hottest_first

if TYPE_CHECKING:
    from fomoe_io.experts.profile import Profile
    from fomoe_io.storage.store import Store

WARM_START_WEIGHT = 0.1
"""Of a profile's picks per token beside those that follow.  At full weight a profile of another kind of text costs more
misses than it saves; at a tenth it costs none and a fitting one saves as many (docs/caching.md)."""


def seeds(store: Store, profile: Profile | None, slots: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """What each layer's slots are filled with.

    Parameters
    ----------
    store : Store
    profile : Profile or None
    slots : numpy.ndarray
        int [layers]

    Yields
    ------
    (layer, experts, scores) : int, int32 [n], float64 [n]
        Hottest first, at most as many as there are slots.
    """
    experts = {layer: found.n_experts for layer, found in store.experts.items()}
    frequencies = profile.frequencies(experts) if profile else {}
    for layer, count in experts.items():
        if layer >= len(slots):  # of a draft block
            continue
        if layer in frequencies:
            order = hottest_first(frequencies[layer])[: slots[layer]]
            yield layer, order, WARM_START_WEIGHT * frequencies[layer][order]
        elif slots[layer] == count:
            yield layer, np.arange(count, dtype=np.int32), np.zeros(count)
