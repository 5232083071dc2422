"""The profile that running a model leaves behind: which experts its router picked, for the next warm start.

It is one file a model, named after the fingerprint of its weights, in the user's cache directory.  A profile decides
what is in memory at the start, hence how fast the first tokens come, and never what they are.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fomoe_io.errors import FomoeError, FormatError
from fomoe_io.experts.profile import Profile
from fomoe_io.system.files import cache_folder

if TYPE_CHECKING:
    from fomoe_io.engine import Engine
    from fomoe_io.storage.store import Store

HALF_LIFE_TOKENS = 1 << 16
"""Older picks count half.  A profile of 25,000 to 75,000 tokens has seen 98 % of the experts of models with 128 to 512
a layer (the published counts of mbolt): so many suffice, and habits of last month fade."""


def default_path(fingerprint: str) -> Path:
    """Where the profile of a model lies unless the user says otherwise."""
    return cache_folder() / "profiles" / f"{fingerprint}.json"


def load(path: Path, store: Store) -> Profile | None:
    """A profile that fits the model; None when there is no file.

    Raises
    ------
    FormatError
        It is damaged, or of another model.
    """
    if not path.exists():
        return None
    profile = Profile.load(path)
    if profile.fingerprint not in (None, store.fingerprint):
        raise FormatError(
            f"profile {path} is of another model (fingerprint {profile.fingerprint}, not {store.fingerprint})",
            hint="another --profile FILE, or --no-profile",
        )
    profile.fitted(_experts(store))
    return profile


def _is_ours(path: Path) -> bool:
    """Whether a profile may be written here: there is none, or one in our own format (JSON)."""
    if not path.exists():
        return True
    with path.open("rb") as stream:
        return stream.read(1) == b"{"


def _experts(store: Store) -> dict[int, int]:
    return {number: layer.n_experts for number, layer in store.experts.items()}


def for_warm_start(wanted: Path | Literal["learned"] | None, store: Store) -> Profile | None:
    """The profile that an engine starts with: the one that was asked for, else the store's own.

    Raises
    ------
    FormatError
        A file that was named is damaged, or of another model.  What earlier runs have left is ignored in that case, and
        when it can't be read.
    """
    found = None
    if wanted == "learned":
        with contextlib.suppress(FomoeError, OSError):  # no home directory, no right to read
            found = load(default_path(store.fingerprint), store)
    elif wanted is not None:
        found = load(wanted, store)
    return found or of_store(store)


def of_store(store: Store) -> Profile | None:
    """The profile that a store was packed with, as counts; None without one."""
    counts = {
        number: np.rint(layer.frequency * store.profile_tokens).astype(np.int64)
        for number, layer in store.experts.items()
        if layer.frequency is not None
    }
    return Profile(store.profile_tokens, counts, store.path.name, store.fingerprint) if counts else None


def merged(old: Profile | None, counts: dict[int, np.ndarray], tokens: int, store: Store) -> Profile:
    """Old counts, faded by the tokens read since, and new ones.

    Parameters
    ----------
    old : Profile or None
    counts : dict of int to numpy.ndarray
        Layer -> int64 [experts]: the router's picks of this run.
    tokens : int
        Tokens of this run.
    store : Store
    """
    if old is None:
        return Profile(tokens, counts, "", store.fingerprint)
    keep = 0.5 ** (tokens / HALF_LIFE_TOKENS)
    before = old.fitted(_experts(store))
    added = {
        number: picks + np.rint(keep * before[number]).astype(np.int64) if number in before else picks
        for number, picks in counts.items()
    }
    return Profile(tokens + round(keep * old.tokens), added, old.source, store.fingerprint)


def save(engine: Engine, wanted: Path | Literal["learned"]) -> int:
    """Add what the engine's router has picked, since this was last done, to a profile; the tokens behind it, 0: none.

    The file is read again, so that a run that ended meanwhile is not lost, and replaced whole.

    Raises
    ------
    FormatError
        A file that was named is damaged, or of another model.
    OSError
        It can't be written.
    """
    seen, store = engine.expert_counts(), engine.store
    counts = {layer: picks - engine.kept_counts.get(layer, 0) for layer, picks in seen.items()}
    tokens = max(int(picks.sum()) for picks in counts.values()) // engine.shape.used
    if not tokens:
        return 0
    profile = merged(for_warm_start(wanted, store), counts, tokens, store)
    path = default_path(store.fingerprint) if wanted == "learned" else wanted
    if wanted != "learned" and not _is_ours(path):  # counts of another program's making are read, never overwritten
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.save(path)
    engine.kept_counts = seen
    return profile.tokens
