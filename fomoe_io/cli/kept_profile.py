"""What the commands that hold a conversation do with a learned profile."""

from __future__ import annotations

from fomoe_io.cli.common import note
from fomoe_io.engine import Engine
from fomoe_io.errors import FomoeError
from fomoe_io.experts import learned_profile


def keep_profile(engine: Engine) -> None:
    """Also when an answer was cut short.  That it fails is an error only for a file that was named."""
    wanted = engine.config.profile
    if wanted is None:
        return
    try:
        learned_profile.save(engine, wanted)
    except (OSError, FomoeError) as error:
        if wanted != "learned":
            raise
        why = error.message if isinstance(error, FomoeError) else f"{error.filename}: {error.strerror}"
        note(f"note: the profile was not kept: {why}")
