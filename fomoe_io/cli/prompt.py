"""The interactive prompt: a line with history and editing, or plain input where there is no terminal."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from fomoe_io.cli.common import Terminated
from fomoe_io.cli.parser import valid_text


def _history() -> Any:
    """Of earlier conversations where there is a place for it, else of this one."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fomoe_io"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "history").open("ab"):
            return FileHistory(str(folder / "history"))
    except (RuntimeError, OSError):  # no home directory, or one that may not be written
        return InMemoryHistory()


@cache
def _session() -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    for name in ("prompt_toolkit", "asyncio"):  # a signal that meets one of their tasks is raised, and not told besides
        logging.getLogger(name).addHandler(logging.NullHandler())
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text:
            buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    # the answer's stdout may be a file
    return PromptSession(history=_history(), key_bindings=keys, output=create_output(stdout=sys.stderr))


def read_line() -> str | None:
    """What the user typed (Alt-Enter starts a new line); None at the end of input or at Ctrl-C on an empty line.

    Ctrl-C clears a line that was begun.
    """
    try:
        text: str = _session().prompt("> ")
    except Terminated:
        raise
    except (EOFError, KeyboardInterrupt):
        return None
    return valid_text(text)
