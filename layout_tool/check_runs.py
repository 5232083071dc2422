"""Whether a model would run, before anything is written: the checks of the engine, without its compiled code."""

from __future__ import annotations

from fomoe_io.models import check_model
from fomoe_io.storage.store import Store
from fomoe_io.text.tokenizer import Tokenizer


def check_runs(store: Store) -> None:
    """Refuse what `fomoe-run` would refuse.

    Raises
    ------
    FormatError
        An architecture or tokenizer that is not supported, or keys and tensors that do not make a model of it.
    """
    check_model(store)
    Tokenizer.from_metadata(store.metadata)
