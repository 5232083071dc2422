"""`fomoe-layout profile`: count which experts a text picks, or convert counts from another program."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fomoe_io.cli.common import decoded, note
from fomoe_io.cli.progress import Progress
from fomoe_io.errors import UsageError
from fomoe_io.experts.profile import Profile
from fomoe_io.storage.store import Store
from fomoe_io.system.files import check_targets
from layout_tool.direct import write_error

CONTEXT_TOKENS = 512
"""The text is read in pieces of this length, each on its own: as llama-imatrix does."""


def convert(model_path: Path, source: Path, output: Path) -> int:
    """Write a `.freq` or imatrix profile in our own format, after checking that it fits the model.

    Raises
    ------
    FomoeError
    """
    store = Store.open(model_path)
    found = Profile.load(source)
    fitted = found.fitted({number: layer.n_experts for number, layer in store.experts.items()})
    return _save(Profile(found.tokens, fitted, found.source, found.fingerprint), output)


def collect(
    model_path: Path, text_path: Path, output: Path, *, context: int, chunks: int, ram_bytes: int | None
) -> int:
    """Run a text through the model and write how often each expert was picked.

    Parameters
    ----------
    model_path, text_path, output : Path
    context : int
        Tokens of a piece.
    chunks : int
        Pieces at most; 0 for the whole text.
    ram_bytes : int or None
        Memory budget of the engine.

    Raises
    ------
    FomoeError
    """
    # The rest of this program needs no compiled code; only counting needs the engine.
    from fomoe_io.config import EngineConfig
    from fomoe_io.engine import Engine

    check_targets([output])
    text = decoded(text_path.read_bytes())
    with Engine.open(model_path, EngineConfig(ram_bytes=ram_bytes, context_tokens=context)) as engine:
        tokens = engine.tokenizer.encode(text)
        if chunks:
            tokens = tokens[: chunks * context]
        if not tokens:
            raise UsageError(f"{text_path} has no text", hint="give a text of a few thousand words: -f TEXT")
        session = engine.session()
        with Progress("profile", len(tokens), unit="tok") as progress:
            for first in range(0, len(tokens), context):
                piece = tokens[first : first + context]
                session.reset()
                session.prefill(piece)
                progress.add(len(piece))
        counts = {layer: np.asarray(picks, np.int64) for layer, picks in engine.expert_counts().items()}
        fingerprint = engine.store.fingerprint
    return _save(Profile(len(tokens), counts, output.name, fingerprint), output)


def _save(profile: Profile, output: Path) -> int:
    try:
        profile.save(output)
    except OSError as error:
        raise write_error(error, output) from error
    note(f"profile  {len(profile.counts)} layers over {profile.tokens:,} tokens -> {output}")
    return 0
