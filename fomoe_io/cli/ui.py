"""What a terminal is told beside the text: colour, notes, and silence while an answer comes."""

from __future__ import annotations

import os
import sys
import termios
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from fomoe_io.errors import printable
from fomoe_io.serve.thoughts import ThoughtSplitter

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def has_color(choice: str, stream: TextIO) -> bool:
    """Whether a stream gets colour: "on", "off", or "auto": a terminal that can, unless NO_COLOR is set."""
    if choice != "auto":
        return choice == "on"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def aside(text: str, color: str = "auto") -> None:
    """A remark on stderr, dimmed where there is colour."""
    harmless = "\n".join(map(printable, text.split("\n")))
    print(f"{DIM}{harmless}{PLAIN}" if has_color(color, sys.stderr) else harmless, file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """What is written of a text: all of it to a file or a pipe, without control sequences to a terminal.

    Nobody wrote them who knows the terminal: a model repeats what it read, which may retitle or clear it.
    """
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else printable(c) for c in text)


@contextmanager
def typing_is_silent() -> Iterator[None]:
    """While an answer is written, what is typed does not echo into it; it is there for the next prompt."""
    before = None
    with suppress(OSError, ValueError, AttributeError, termios.error):
        descriptor = sys.stdin.fileno()
        if os.isatty(descriptor):
            before = termios.tcgetattr(descriptor)
            silent = [*before]
            silent[3] &= ~termios.ECHO
            termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError, termios.error):
                termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class AnswerWriter:
    """Writes an answer to stdout as it comes; on a terminal with colour the model's thoughts are dim, without tags.

    Parameters
    ----------
    color : str
    is_thinking : bool
        The prompt has begun the thoughts already.
    copy : TextIO or None
        Gets the text, too (`--output`).
    is_mute : bool
        Nothing goes to stdout: the text is in `--json -`.
    """

    def __init__(
        self, color: str = "auto", *, is_thinking: bool = False, copy: TextIO | None = None, is_mute: bool = False
    ) -> None:
        colored = sys.stdout.isatty() and has_color(color, sys.stdout)
        self._splitter = ThoughtSplitter(is_thinking=is_thinking) if colored else None
        self._kind = "text"
        self._copy = copy
        self._is_mute = is_mute

    def write(self, text: str) -> None:
        """More of it."""
        if self._copy is not None:
            self._copy.write(text)
        if self._is_mute:
            return
        parts = [("text", text)] if self._splitter is None else self._splitter.add(text)
        for kind, part in parts:
            self._part(kind, part)
        sys.stdout.flush()

    def _part(self, kind: str, text: str) -> None:
        if kind != self._kind:
            sys.stdout.write(DIM if kind == "thought" else f"{PLAIN}\n\n")
            self._kind = kind
        sys.stdout.write(shown(text))

    def end(self) -> None:
        """The answer is over, or was cut short."""
        if self._copy is not None:
            self._copy.write("\n")
            self._copy.flush()
        if self._is_mute:
            return
        for kind, part in self._splitter.finish() if self._splitter is not None else ():
            self._part(kind, part)
        if self._kind == "thought":
            sys.stdout.write(PLAIN)
        print(flush=True)
