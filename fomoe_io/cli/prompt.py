"""The interactive prompt: a line with history and editing, or plain input where there is no terminal."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _session() -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fomoe_io"
    state.mkdir(parents=True, exist_ok=True)
    return PromptSession(history=FileHistory(str(state / "history")), key_bindings=keys)


def read_line() -> str | None:
    """What the user typed (Alt-Enter starts a new line); None at the end of input or at Ctrl-C on an empty line."""
    try:
        text: str = _session().prompt("> ")
    except (EOFError, KeyboardInterrupt):
        return None
    return text
